"""Engines in one process on a virtual clock, wired to each other's pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from services.engine.core import api
from services.engine.core.config import CoreConfig
from services.engine.core.core import EngineCore
from services.engine.core.faults import FaultPoints
from services.engine.core.guides import GuidePort
from services.engine.core.plan import Runner
from services.engine.sampling.params import SamplingParams
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from tests.engine.core.answers import Answer, Clock, Stream
from tests.engine.core.fake_runner import FakeRunner, expected_tokens
from tests.engine.core.fake_transfer import FakeService, Network

PAGE_SIZE = 4
VOCAB = 50
GREEDY = SamplingParams()
LAG: ContextVar[int] = ContextVar("lag", default=0)  # of every engine's runner, see conftest.py
at_once = pytest.mark.parametrize("lag", [0], ids=[""], indirect=True)  # for tests that count steps


class Node:
    """One engine, its listener, and short ways to call it."""

    def __init__(
        self,
        clock: Clock,
        network: Network | None,
        name: str,
        *,
        make_runner: Callable[[CoreConfig], Runner] | None = None,
        faults: FaultPoints | None = None,
        make_guides: Callable[[Callable[[api.Command], None]], GuidePort] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.clock = clock
        self.config = make_config(incarnation=name.encode(), **options)
        self.fake = FakeRunner(self.config.num_pages, self.config.page_size, self.config.vocab_size, lag=LAG.get())
        self.runner: Runner = make_runner(self.config) if make_runner else self.fake
        self.inbox: list[api.Command] = []
        self.streams: dict[int, Stream] = defaultdict(Stream)
        self.loads: list[api.Load] = []
        self._call_ids = count(1)
        self._names = count(1)
        self.service = FakeService(network or Network(), name, self.fake.memory)
        if network is not None:
            network.services[name] = self.service
            self.service.submit = self.inbox.append
            self.service.announce()
        port = None if network is None else self.service
        guides = make_guides(self.inbox.append) if make_guides else None
        self.core = EngineCore(self.config, self.runner, self, port, clock=clock, guides=guides, faults=faults)

    # --- EngineListener ---------------------------------------------------------------------------------------

    def on_outputs(self, outputs: Sequence[api.SequenceOutput]) -> None:
        call_ids = [output.call_id for output in outputs]
        assert len(set(call_ids)) == len(call_ids), "two entries of one sequence"
        for output in outputs:
            self.streams[output.call_id].add(output)

    def on_load(self, load: api.Load) -> None:
        self.loads.append(load)

    def on_fatal(self, error: BaseException) -> None:
        raise AssertionError("the loop failed") from error

    # --- verbs ------------------------------------------------------------------------------------------------

    def key(self, name: str | None = None) -> api.RequestKey:
        return api.RequestKey("router", name or f"{self.name} request {next(self._names)}")

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams = GREEDY, /, *, name: str | None = None, **options: Any
    ) -> Stream:
        call_id = next(self._call_ids)
        command = api.StartGenerate(self.key(name), tuple(prompt), 0, 0, sampling, None, "", None, call_id=call_id)
        self.inbox.append(replace(command, **options))
        return self.streams[call_id]

    def prep_recv(
        self, prompt: Sequence[int], end: int, /, *, name: str | None = None, **options: Any
    ) -> Answer[api.Reserved]:
        answer: Answer[api.Reserved] = Answer()
        command = api.PrepRecv(self.key(name), tuple(prompt), end, "", None, None, answer)
        self.inbox.append(replace(command, **options))
        return answer

    def remote_send(
        self, prompt: Sequence[int], begin: int, end: int, reserved: api.Reserved, /, *, name: str | None = None,
        **options: Any,
    ) -> Answer[Timing]:  # fmt: skip
        answer: Answer[Timing] = Answer()
        command = api.RemoteSend(
            self.key(name), tuple(prompt), TokenRange(begin, end), reserved.address, 1, "", None, answer
        )
        self.inbox.append(replace(command, **options))
        return answer

    def release(self, reserved: api.Reserved, *, publish: bool = False) -> Answer[int]:
        answer: Answer[int] = Answer()
        self.inbox.append(api.Release(ref_of(reserved), publish, answer))
        return answer

    def renew(self, reserved: api.Reserved, lease_s: float | None = None) -> Answer[float]:
        answer: Answer[float] = Answer()
        self.inbox.append(api.Renew(ref_of(reserved), lease_s, answer))
        return answer

    def abort(self, name: str) -> Answer[None]:
        answer: Answer[None] = Answer()
        self.inbox.append(api.Abort(self.key(name), answer))
        return answer

    def cancel(self, name: str) -> None:
        self.inbox.append(api.Cancel(self.key(name)))

    def reservations(self) -> tuple[api.ReservationInfo, ...]:
        answer: Answer[tuple[api.ReservationInfo, ...]] = Answer()
        self.core.step([api.ListReservations("", answer)])
        return answer.value

    # --- running ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step over what is in the inbox. Returns whether another should follow."""
        commands = list(self.inbox)
        self.inbox.clear()
        is_busy = self.core.step(commands)
        self.core.check_invariants()
        return is_busy or bool(self.inbox)

    def run(self) -> None:
        """Steps until nothing happens any more; the transfer service stands still meanwhile."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("it never ends")

    def expected(self, prompt: Sequence[int], num_tokens: int, sampling: SamplingParams = GREEDY) -> list[int]:
        return expected_tokens(prompt, num_tokens, sampling, self.config.vocab_size)

    @property
    def pages(self) -> api.PageCounts:
        return self.core.load().pages

    def assert_idle(self) -> None:
        """Nothing is held by anybody."""
        self.core.check_invariants()
        assert (self.pages.held, self.pages.quarantined) == (0, 0)
        load = self.core.load()
        assert (load.running_sequences, load.waiting_sequences, load.reservations) == (0, 0, 0)


class World:
    """A sender P and a receiver D, and what lies between."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.network = Network()
        self.nodes: list[Node] = []
        self.p = self.join("P", **options)
        self.d = self.join("D", **options)

    def join(self, name: str, **options: Any) -> Node:
        """One more engine."""
        self.nodes.append(Node(self.clock, self.network, name, **options))
        return self.nodes[-1]

    def run(self) -> None:
        """Lets everything happen until nothing happens any more."""
        for _ in range(10_000):
            is_busy = [node.step() for node in self.nodes]
            if not any([*is_busy, self.network.pump(), *(node.inbox for node in self.nodes)]):
                return
        raise AssertionError("it never ends")

    def reserve(self, prompt: Sequence[int], end: int, **options: Any) -> api.Reserved:
        answer = self.d.prep_recv(prompt, end, **options)
        self.run()
        return answer.value

    def assert_idle(self) -> None:
        for node in self.nodes:
            node.assert_idle()


def events(world: World) -> Iterator[None]:
    """One thing after another, round and round, layer by layer."""
    while True:
        for happen in (world.p.step, world.d.step, world.p.service.pump, world.d.service.pump):
            happen()
            yield
        for push in list(world.p.service.pushes.values())[:1]:
            world.p.service.max_layers = push.num_layers + 1
            world.p.service.advance(push)
            world.p.service.max_layers = None
            yield


def ref_of(reserved: api.Reserved) -> api.ReservationRef:
    return api.ReservationRef(reserved.address.reservation_id, reserved.address.secret)


def make_config(
    *, page_size: int = PAGE_SIZE, num_pages: int = 32, max_context: int = 64, **options: Any
) -> CoreConfig:
    """Small numbers, so that every limit is met."""
    defaults: dict[str, Any] = {"vocab_size": VOCAB, "poison_pages": True, "max_step_tokens": 16, "max_batch_size": 8}
    return CoreConfig(
        model_digest=b"model",
        layout=options.pop("layout", None) or PageLayout(3, 1, 1, page_size, Dtype.FLOAT32),
        num_pages=num_pages,
        max_context=max_context,
        **{**defaults, **options},
    )


def prompt_of(length: int, start: int = 0) -> tuple[int, ...]:
    """Tokens that differ from those of another start in the first one."""
    return tuple((start * 7 + 3 * index) % VOCAB for index in range(length))
