"""What a fake engine tells of itself, and how it is made to fail."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import EngineServiceServicer
from microserve.types.v1 import kv_pb2

from services.protocol.errors import ServiceError
from tests.fake_kv import FakeKv
from tests.fake_model import FakeModel

NUM_PAGES = 1 << 20


@dataclass
class Fault:
    """Makes a verb fail with `error`, or hang until it is cancelled; `late`: after it has taken effect.

    `after_tokens` is for StartGenerate, and so is `after_told`: so many tokens of the prompt; `times` is how often it
    happens, 0: always.
    `reached` is set when a call runs into it.
    """

    error: ServiceError | None = None
    late: bool = False
    after_tokens: int = 0
    after_told: int = 0
    times: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)


class FakeDescription(EngineServiceServicer):
    """The half of an engine that only talks about itself."""

    def __init__(
        self,
        model: FakeModel,
        name: str = "a",
        *,
        peers: dict[str, Any] | None = None,
        labels: dict[str, str] | None = None,
        kvtransfer: bool = True,
        page_size: int = 4,
        lease_s: float = 30.0,
        max_batch_size: int = 8,
    ) -> None:
        self.model, self.name, self.labels = model, name, labels or {}
        self.peers = {} if peers is None else peers
        self.kvtransfer, self.max_batch_size = kvtransfer, max_batch_size
        self.incarnation = secrets.token_bytes(16)
        self.kv = FakeKv(model.digest, page_size, lease_s, self._notify)
        self.faults: dict[str, Fault] = {}
        self.calls: list[tuple[str, Any]] = []
        self.gate = asyncio.Event()  # no token while it is clear
        self.gate.set()
        self.tokens_at_once = 1  # in each piece of a sequence
        self.contract_version = "1.1"
        self.max_message_bytes = 0  # not told
        self.sequences: set[str] = set()
        self.running: dict[str, asyncio.Task[None]] = {}  # sequences of the session
        self.num_sends = 0
        self.draining = False
        self.address = ""
        self._changes: set[asyncio.Event] = set()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        await self._enter("GetInfo", request)
        return pb.GetInfoResponse(
            engine_name=self.name,
            incarnation=self.incarnation,
            contract_version=self.contract_version,
            model=self.model.name,
            model_digest=self.model.digest,
            tokenizer_digest=self.model.tokenizer_digest,
            layout=kv_pb2.PageLayout(page_size=self.kv.page_size),
            max_context_length=self.model.max_context,
            vocab_size=self.model.vocab_size,
            kvtransfer_endpoint=self.address if self.kvtransfer else "",
            labels=self.labels,
            max_batch_size=self.max_batch_size,
            max_message_bytes=self.max_message_bytes,
        )

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:
        changed = self._subscribe()
        try:
            while True:
                yield pb.WatchLoadResponse(
                    running_sequence_count=len(self.sequences),
                    reservation_count=len(self.kv.live),
                    draining=self.draining,
                    pages=pb.PageCounts(free=NUM_PAGES, total=NUM_PAGES),
                )
                await changed.wait()
                changed.clear()
        finally:
            self._changes.discard(changed)

    async def WatchKvEvents(self, request: Any, context: Any) -> AsyncIterator[pb.WatchKvEventsResponse]:
        await self._enter("WatchKvEvents", request)
        stored: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self.kv.on_stored.append(stored.put_nowait)
        try:
            yield _kv_event(0, list(self.kv.cached), snapshot=True)
            sequence = 0
            while True:
                blocks = await stored.get()
                sequence += 1 if "skip" not in self.faults else 2
                yield _kv_event(sequence, blocks)
        finally:
            self.kv.on_stored.remove(stored.put_nowait)

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[pb.GetTokenizerResponse]:
        await self._enter("GetTokenizer", request)
        for name, data in self.model.tokenizer_files.items():
            for begin in range(0, len(data), 1000):
                yield pb.GetTokenizerResponse(file_name=name, data=data[begin : begin + 1000])

    def drain(self) -> None:
        """Reports that it takes no new work."""
        self.draining = True
        self._notify()

    async def _enter(self, method: str, request: Any) -> None:
        self.calls.append((method, request))
        await self._fault(method)

    async def _fault(self, method: str, *, late: bool = False) -> None:
        fault = self.faults.get(method)
        if fault is not None and fault.late == late:
            fault.reached.set()
            if fault.times:
                fault.times -= 1
                if not fault.times:
                    del self.faults[method]
            if fault.error is not None:
                raise fault.error
            await asyncio.Event().wait()

    def _subscribe(self) -> asyncio.Event:
        changed = asyncio.Event()
        self._changes.add(changed)
        return changed

    def _notify(self) -> None:
        for changed in self._changes:
            changed.set()


def _kv_event(sequence: int, stored: list[bytes], *, snapshot: bool = False) -> pb.WatchKvEventsResponse:
    blocks = [kv_pb2.BlockHash(value=each) for each in stored]
    return pb.WatchKvEventsResponse(sequence=sequence, snapshot=snapshot, snapshot_complete=snapshot, stored=blocks)
