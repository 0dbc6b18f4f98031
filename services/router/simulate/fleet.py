"""A router over simulated engines: the real registry, members, programs, cost model; only engines and clock are not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from services.protocol.errors import ServiceError
from services.router.clock import now
from services.router.fleet.backoff import BackoffConfig
from services.router.fleet.breaker import BreakerConfig
from services.router.fleet.member import Member
from services.router.fleet.registry import Registry
from services.router.planning.host import BUILT_IN, PlannerHost, PlannerLimits
from services.router.programs.catalogue import Catalogue
from services.router.programs.host import PolicyHost
from services.router.programs.library import Library
from services.router.programs.program import PLANNER
from services.router.programs.runner import RunLimits
from services.router.request import PolicyRequest
from services.router.simulate.hardware import FleetHardware
from services.router.simulate.port import MODEL, SimulatedPort, Wires
from services.router.text.store import Download, TokenizerStore
from services.router.text.tokenizer import Tokenizer, TokenizerFiles
from services.router.traces import Trace
from services.router.values import Sampling

PROGRAM_LIMITS = RunLimits(between_chunks_s=1e9)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, in seconds from the start, and what. It generates exactly `output_tokens`."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


class _NoTokenizers(TokenizerStore):
    """Prompts are token ids."""

    def __init__(self) -> None:
        super().__init__()
        backend = Backend(models.BPE())
        backend.decoder = decoders.ByteLevel()
        self._only = Tokenizer(TokenizerFiles(backend.to_str(), None, {}))

    async def obtain(self, digest: bytes, download: Download) -> Tokenizer:
        """With no thread, which a simulated clock would not wait for."""
        return self._only


class SimulatedRouter:
    """What is measured of the engines is kept from one `serve` to the next."""

    def __init__(self, hardware: FleetHardware, files: Iterable[Path] = ()) -> None:
        """BadPolicy if a file cannot be loaded."""
        self._catalogue = Catalogue(files)
        self.registry = Registry()
        self._host = host = PolicyHost(self.registry, self._catalogue, PROGRAM_LIMITS)
        planners = Library(PLANNER, BUILT_IN)
        self.planners = PlannerHost(
            self.registry, planners, host.traffic, host.costs, host.homes, PlannerLimits(look_s=1e9)
        )
        wires, tokenizers = Wires(hardware), _NoTokenizers()
        for name, each in hardware.engines.items():
            port = SimulatedPort(name, each, wires)
            self.registry.add(Member(name, port, tokenizers, self.registry, BackoffConfig(), BreakerConfig()))

    async def joined(self) -> None:
        """Waits until every engine takes work."""
        changed = asyncio.Event()
        self.registry.on_change(changed.set)
        while not all(member.healthy for member in self.registry.members.values()):
            await changed.wait()
            changed.clear()

    async def close(self) -> None:
        """Ends everything."""
        await self.planners.close()
        await self._host.close()
        await self.registry.stop()

    async def serve(self, policy: str, arrivals: Sequence[Arrival], salt: str = "") -> list[Trace]:
        """What became of each request. UnknownPolicy, BadPolicy."""
        begin = now()
        self._catalogue.bind(policy)

        async def one(number: int, arrival: Arrival) -> Trace:
            await asyncio.sleep(begin + arrival.at_s - now())
            sampling = Sampling(max_tokens=arrival.output_tokens, ignore_eos=True)
            request = PolicyRequest(f"{salt}/{number}", MODEL, arrival.prompt, sampling, salt)
            return await self._answer(policy, request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*each)) for each in enumerate(arrivals)]
        return [task.result() for task in tasks]

    async def _answer(self, policy: str, request: PolicyRequest) -> Trace:
        begin, first_s, tokens, code = now(), None, 0, "OK"
        run = self._host.run(self._catalogue.bind(policy), request)
        try:
            while (chunk := await run.take()) is not None:
                tokens += len(chunk.token_ids)
                first_s = now() - begin if first_s is None and tokens else first_s
        except ServiceError as error:
            code = error.code.name
        elapsed_s = now() - begin
        await run.close()
        return Trace(run.served_by.spec, run.legs.legs(), code, elapsed_s, first_s, tokens, run.legs.decision)


@asynccontextmanager
async def simulated_router(hardware: FleetHardware, files: Iterable[Path] = ()) -> AsyncIterator[SimulatedRouter]:
    """One whose engines have joined; to be used on a VirtualLoop."""
    router = SimulatedRouter(hardware, files)
    try:
        await router.joined()
        yield router
    finally:
        await router.close()
