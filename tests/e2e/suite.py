"""A running suite of real processes, and the eyes to look into it: stubs, page counts, and the pools' own bytes."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
from microserve.engine.v1 import engine_pb2 as engine
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.kvtransfer.v1 import kvtransfer_pb2 as kvtransfer
from microserve.kvtransfer.v1.kvtransfer_pb2_grpc import KvTransferServiceStub
from microserve.router.v1 import admin_pb2
from microserve.router.v1 import router_pb2 as router
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from microserve.types.v1 import kv_pb2 as kv
from microserve.types.v1 import sampling_pb2 as sampling

from services.cli.client import wait_serving
from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess
from services.engine.convert import from_layout

OWNER = "test"
# Of reservations that are not about leases: longer than any test, so that none ends while a process stands still.
LEASE_S = 500


@dataclass
class Engine:
    """An engine and a stub to it."""

    process: ServiceProcess
    stub: EngineServiceStub

    @property
    def name(self) -> str:
        return self.process.name


@dataclass
class Suite:
    """One kvtransfer or several, some engines and, if asked for, a router."""

    fleet: Fleet
    kvtransfer: ServiceProcess
    transfer: KvTransferServiceStub
    engines: list[Engine]
    channels: list[grpc.aio.Channel]
    router_process: ServiceProcess | None = None
    router: RouterServiceStub | None = None
    admin: AdminServiceStub | None = None
    other_kvtransfers: list[ServiceProcess] = field(default_factory=list)
    _serial: int = field(default=0)

    @property
    def kvtransfers(self) -> list[ServiceProcess]:
        """All transfer services; engine i belongs to the one at i modulo their number."""
        return [self.kvtransfer, *self.other_kvtransfers]

    def replace_kvtransfer(self, index: int, process: ServiceProcess) -> None:
        """Another process serves where that transfer service did."""
        if index == 0:
            self.kvtransfer = process
        else:
            self.other_kvtransfers[index - 1] = process

    def kvtransfer_of(self, index: int) -> ServiceProcess:
        """The transfer service of an engine."""
        return self.kvtransfers[index % len(self.kvtransfers)]

    def new_id(self) -> str:
        """A request id that was not used before."""
        self._serial += 1
        return f"call-{self._serial}"

    def connect(self, address: str) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(address)
        self.channels.append(channel)
        return channel

    async def transferred_bytes(self) -> int:
        """Bytes that the transfer service says it moved."""
        stats = await self.transfer.GetStats(kvtransfer.GetStatsRequest())
        return sum(transport.bytes for transport in stats.transports)


@asynccontextmanager
async def start_suite(
    model: Path,
    *,
    num_engines: int = 2,
    num_kvtransfers: int = 1,
    policy: str | Path | None = "disaggregated",
    engine_options: Sequence[str] = (),
    router_options: Sequence[str] = (),
    kvtransfer_options_of: dict[int, Sequence[str]] | None = None,
    page_count: int | None = None,
    page_size: int | None = None,
    kv_memory_mib: int = 128,
    options_of: dict[int, Sequence[str]] | None = None,
) -> AsyncIterator[Suite]:
    """Starts real processes on free ports, with freed pages poisoned; stops them all at the end.

    With several transfer services the engines take turns, and KV moves between them by tcp. Pools are small
    unless asked for, so that they start quickly: memory is mapped and poisoned at the start.
    """
    os.environ["MICROSERVE_TESTING"] = "1"
    pool = ["--poison-pages", "--kv-memory-mib", str(kv_memory_mib)]
    pool += [] if page_count is None else ["--pages", str(page_count)]
    pool += [] if page_size is None else ["--page-size", str(page_size)]
    with Fleet() as fleet:
        transfer, *others = [
            fleet.start_kvtransfer(f"kvtransfer-{i}", extra=(kvtransfer_options_of or {}).get(i, ()))
            for i in range(num_kvtransfers)
        ]
        processes = [
            fleet.start_engine(
                f"engine-{i}",
                model,
                [transfer, *others][i % num_kvtransfers],
                extra=[*pool, *engine_options, *(options_of or {}).get(i, ())],
            )
            for i in range(num_engines)
        ]
        stub = KvTransferServiceStub(channel(transfer.address))
        suite = Suite(fleet, transfer, stub, [], [], other_kvtransfers=others)
        for process in processes:
            suite.engines.append(Engine(process, EngineServiceStub(suite.connect(process.address))))
        if policy is not None:
            suite.router_process = fleet.start_router(processes, policy, extra=list(router_options))
            front = suite.connect(suite.router_process.address)
            suite.router, suite.admin = RouterServiceStub(front), AdminServiceStub(front)
            await wait_serving(suite.router_process.address, 120)
            await router_sees(suite, num_engines)
        try:
            yield suite
        finally:
            for open_channel in suite.channels:
                await open_channel.close()


def channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address)


async def router_sees(suite: Suite, num_healthy: int) -> None:
    """Waits until the router has found as many engines healthy."""
    assert suite.admin is not None
    async with asyncio.timeout(120):
        while True:
            listed = await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
            if sum(status.healthy for status in listed.engines) == num_healthy:
                return
            await asyncio.sleep(0.1)


# --- verbs by hand ----------------------------------------------------------------------------------------------


async def prep_recv(
    suite: Suite, at: Engine, prompt: Sequence[int], end: int, *, lease_s: float = LEASE_S, **fields: object
) -> engine.PrepRecvResponse:
    request = engine.PrepRecvRequest(
        owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=prompt, end=end, **fields
    )
    request.lease.FromMilliseconds(round(1000 * lease_s))
    return await at.stub.PrepRecv(request, timeout=60)


async def give_up(at: Engine, prepared: engine.PrepRecvResponse) -> None:
    """Ends a reservation that nobody will use; one that has ended is no error."""
    address = prepared.address
    reference = engine.ReservationRef(reservation_id=address.reservation_id, secret=address.secret)
    await at.stub.Release(engine.ReleaseRequest(reservation=reference), timeout=60)


async def remote_send(
    suite: Suite, at: Engine, prompt: Sequence[int], address: kv.KvAddress, **fields: object
) -> engine.RemoteSendResponse:
    request = engine.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=prompt,
        range=address.window,
        address=address,
        **fields,
    )
    return await at.stub.RemoteSend(request, timeout=60)


@dataclass
class Generated:
    """All that a generation gave."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[sampling.Logprobs] = field(default_factory=list)
    prompt_logprobs: sampling.PromptLogprobs = field(default_factory=sampling.PromptLogprobs)
    finish_reason: int = 0
    timing: sampling.Timing = field(default_factory=sampling.Timing)


async def generate(
    suite: Suite,
    at: Engine,
    prompt: Sequence[int],
    *,
    address: kv.KvAddress | None = None,
    max_tokens: int = 16,
    forced: Sequence[int] = (),
    salt: str = "",
    begun: asyncio.Event | None = None,
    **params: object,
) -> Generated:
    """StartGenerate, greedily unless told otherwise, with the two best log-probabilities of every token. `begun` is
    set with the first of its output."""
    request = engine.StartGenerateRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=prompt,
        begin=address.window.end if address is not None else 0,
        sampling=sampling.SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2, **params),
        cache_salt=salt,
        forced_token_ids=forced,
    )
    if address is not None:
        request.reservation.reservation_id = address.reservation_id
        request.reservation.secret = address.secret
    result = Generated()
    async for message in at.stub.StartGenerate(request, timeout=120):
        if begun is not None:
            begun.set()
        result.token_ids.extend(message.token_ids)
        result.logprobs.extend(message.logprobs)
        result.prompt_logprobs.MergeFrom(message.prompt_logprobs)
        result.finish_reason = message.finish_reason
        result.timing = message.timing
    return result


async def ask(
    suite: Suite, prompt: Sequence[int], policy: str, *, max_tokens: int = 16, salt: str = "", **params: object
) -> Answer:
    """Generate through the router with token ids."""
    assert suite.router is not None
    request = router.GenerateRequest(
        tokens=router.TokenIds(ids=prompt),
        sampling=sampling.SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2, **params),
        cache_salt=salt,
    )
    answer = Answer()
    async for message in suite.router.Generate(request, metadata=(("x-microserve-policy", policy),), timeout=120):
        answer.token_ids.extend(message.token_ids)
        answer.logprobs.extend(message.logprobs)
        answer.prompt_logprobs.MergeFrom(message.prompt_logprobs)
        answer.text += message.text
        answer.legs.extend(message.legs)
        answer.finish_reason = message.finish_reason
    return answer


@dataclass
class Answer:
    """All that the router gave."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[sampling.Logprobs] = field(default_factory=list)
    prompt_logprobs: sampling.PromptLogprobs = field(default_factory=sampling.PromptLogprobs)
    legs: list[sampling.Leg] = field(default_factory=list)
    finish_reason: int = 0

    def leg(self, verb: sampling.Verb.ValueType) -> sampling.Leg:
        (found,) = [leg for leg in self.legs if leg.verb == verb]
        return found


# --- looking inside ---------------------------------------------------------------------------------------------


async def load(at: EngineServiceStub) -> engine.WatchLoadResponse:
    """The engine's present load."""
    call = at.WatchLoad(engine.WatchLoadRequest())
    try:
        async for report in call:
            return report
    finally:
        call.cancel()
    raise AssertionError("no load report")


async def arrived(at: Engine) -> None:
    """Returns when what was asked of the engine before has arrived: round trips on the same connection."""
    for _ in range(20):
        await at.stub.GetInfo(engine.GetInfoRequest(), timeout=60)


async def wait_for_load(at: Engine, condition: object, timeout_s: float = 120.0) -> engine.WatchLoadResponse:
    """Follows the load until `condition(report)`; checks the page accounts of every report on the way."""
    request = engine.WatchLoadRequest()
    request.min_interval.FromMilliseconds(10)
    call = at.stub.WatchLoad(request, timeout=timeout_s)
    try:
        async for report in call:
            check_pages(report.pages)
            if condition(report):  # type: ignore[operator]
                return report
    finally:
        call.cancel()
    raise AssertionError("the load stream ended")


def check_pages(pages: engine.PageCounts) -> None:
    assert pages.free + pages.cached + pages.held + pages.quarantined == pages.total, str(pages)


def idle(report: engine.WatchLoadResponse) -> bool:
    """Whether nothing runs, waits or is held."""
    return (
        report.pages.held == report.pages.quarantined == 0
        and report.running_sequence_count == report.waiting_sequence_count == report.waiting_for_kv_count == 0
        and report.reservation_count == 0
    )


async def pool_of(suite: Suite, at: Engine) -> np.ndarray:
    """The engine's pool as bytes, (layers, pages, bytes of a page of a layer), copied out of the service's memfd."""
    info = await at.stub.GetInfo(engine.GetInfoRequest())
    page_bytes = from_layout(info.layout).layer_page_bytes
    return read_pool(suite.kvtransfer.pid, at.name, (info.layout.layer_count, info.page_count, page_bytes))


def read_pool(pid: int, engine_name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """A copy of the memory of an engine's pool, found among the descriptors of the process that owns it."""
    folder = Path(f"/proc/{pid}/fd")
    links = {entry: os.readlink(entry) for entry in folder.iterdir()}
    (path,) = [entry for entry, target in links.items() if f"microserve-pool-{engine_name} " in target]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        view = np.frombuffer(memory, dtype=np.uint8, count=int(np.prod(shape)))
        pages = view.reshape(shape).copy()
        del view
    return pages
