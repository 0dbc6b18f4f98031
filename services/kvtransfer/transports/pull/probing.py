"""How fast a transport that pulls brings bytes here, tried on memory of no engine when two services meet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Executor

from services.kvtransfer.control import ControlPage
from services.kvtransfer.errors import NoTransport, PeerLost, TransportFailed
from services.kvtransfer.memory import SharedSegment
from services.kvtransfer.plan import PageTable, Piece, plan_pieces
from services.kvtransfer.pool import Pool, PoolMemory, PoolShape
from services.kvtransfer.transports.pull.fetching import Fetch, Fetcher, SinkSide, SourcePool
from services.protocol.extents import ModelPart
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange

# Both sides' memory, 4 MiB: changing it changes what services say to each other.
_LAYOUT = PageLayout(layer_count=1, kv_head_count=1, head_dim=64, page_size=128, dtype=Dtype.FLOAT32)
_NUM_PAGES = 64
_ALL = TokenRange(0, _NUM_PAGES * _LAYOUT.page_size)
_SHAPE = PoolShape(_LAYOUT, _NUM_PAGES, ModelPart.all_of(1, 1))
# The most that is fetched at once, where pieces are set to be small.
PROBE_BUFFERS = 16
PROBE_TIMEOUT_S = 2.0


def make_probe_memory() -> Pool:
    """Host memory that no engine has: fetched from, and fetched into. Raises NoMemory."""
    pool = Pool("probe", "probe", _SHAPE)
    control = ControlPage.create("microserve-control-probe", 1)
    try:
        pages = SharedSegment.create("microserve-probe", _SHAPE.size_bytes, prefault=True)
    except BaseException:
        control.close()
        raise
    pool.memory = PoolMemory(pages, control)
    return pool


class PullProbes:
    """Serves every ProbePull of this service, one at a time. Belongs to the running loop."""

    def __init__(self, sinks: Mapping[str, SinkSide], memory: Pool | None, copiers: Executor, max_bytes: int) -> None:
        """`memory`: from make_probe_memory; None: this service cannot be probed. Copies of `max_bytes` at most."""
        self._sinks = sinks
        self._memory = memory
        self._copiers = copiers
        self._max_bytes = max_bytes
        self._turn = asyncio.Lock()

    async def serve(self, transport: str, offer: bytes) -> tuple[int, float]:
        """Bytes fetched from what `offer` says, and the seconds that it took from the moment that the connection
        stood. Raises NoTransport, TransportFailed, PeerLost."""
        sink, memory = self._sinks.get(transport), self._memory
        if sink is None or memory is None or sink.refuses(memory) is not None:
            raise NoTransport(f"this service cannot be probed over {transport!r}")
        try:
            async with (
                asyncio.timeout(PROBE_TIMEOUT_S),
                self._turn,
                sink.connect(SourcePool(_LAYOUT, _NUM_PAGES, offer), _refuse_to_ask) as fetcher,
            ):
                return await self._measure(memory, fetcher, self._pieces(sink))
        except TimeoutError:
            raise TransportFailed(f"a probe did not end within {PROBE_TIMEOUT_S:g} s") from None

    def _pieces(self, sink: SinkSide) -> tuple[Piece, ...]:
        table = PageTable(tuple(range(_NUM_PAGES)), _LAYOUT.page_size)
        token_bytes = _LAYOUT.layer_page_bytes // _LAYOUT.page_size
        max_bytes = min(self._max_bytes, sink.buffer_bytes)
        return plan_pieces(_ALL, table, table, token_bytes, max_bytes)[:PROBE_BUFFERS]

    async def _measure(self, memory: Pool, fetcher: Fetcher, pieces: tuple[Piece, ...]) -> tuple[int, float]:
        await self._move(memory, fetcher, pieces[0])  # what the connection costs is not its speed
        begin_s = time.perf_counter()
        moved = await asyncio.gather(*(self._move(memory, fetcher, piece) for piece in pieces), return_exceptions=True)
        elapsed_s = time.perf_counter() - begin_s
        for failure in moved:
            if failure is not None:
                raise failure
        return sum(piece.num_bytes for piece in pieces), elapsed_s

    async def _move(self, memory: Pool, fetcher: Fetcher, piece: Piece) -> None:
        async with fetcher.fetch(0, piece) as fetched:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._copiers, fetched.place, memory, 0, piece.runs)


def _refuse_to_ask(fetch: Fetch) -> None:
    raise PeerLost("a sender that must take part in each fetch cannot be probed")
