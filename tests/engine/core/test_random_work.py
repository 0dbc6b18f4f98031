"""Any work in any order: pages add up after every step, every call ends, and tokens are those of an engine alone."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing
from tests.engine.core.answers import Answer, Stream
from tests.engine.core.fake_runner import expected_scores
from tests.engine.core.world import LAG, VOCAB, Node, World, ref_of

pytestmark = pytest.mark.slow

LEASE_S = 8.0


class RandomWork(RuleBasedStateMachine):
    """Two engines with few pages; prompts share beginnings; time and the transfer services move when a rule says so."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[tuple[Node, tuple[int, ...], SamplingParams, Stream]] = []
        self.preps: list[tuple[tuple[int, ...], str, Answer[api.Reserved]]] = []
        self.sends: list[tuple[str, Answer[Timing]]] = []
        self.others: list[Answer[int] | Answer[float] | Answer[None]] = []
        self.names = 0

    @initialize(num_pages=st.integers(10, 20), step=st.integers(3, 20), batch=st.integers(1, 6), at_once=st.booleans(),
                lag=st.integers(0, 1))  # fmt: skip
    def build(self, num_pages: int, step: int, batch: int, at_once: bool, lag: int) -> None:
        LAG.set(lag)
        options = {"num_pages": num_pages, "max_context": 30, "max_step_tokens": step, "max_batch_size": batch}
        self.world = World(default_lease_s=LEASE_S, max_waiting=6, max_wait_s=5.0, **options)
        self.world.network.moves_at_once = at_once

    def name(self) -> str:
        self.names += 1
        return f"call {self.names}"

    @rule(side=st.sampled_from("pd"), root=st.integers(0, 1), length=st.integers(1, 24), count=st.integers(1, 12),
          temperature=st.sampled_from([0.0, 1.0]), timeout=st.sampled_from([None, None, None, 2.0]),
          rate=st.sampled_from([None, None, 1]))  # fmt: skip
    def generate(
        self, side: str, root: int, length: int, count: int, temperature: float, timeout: float | None, rate: int | None
    ) -> None:
        node = self.world.p if side == "p" else self.world.d
        params = SamplingParams(temperature=temperature, seed=root, max_tokens=count, prompt_logprobs=rate)
        deadline = None if timeout is None else self.world.clock.now + timeout
        stream = node.generate(prompt(root, length), params, name=self.name(), deadline=deadline)
        self.streams.append((node, prompt(root, length), params, stream))

    @rule(root=st.integers(0, 1), length=st.integers(1, 24), share=st.floats(0, 1), wait=st.booleans())
    def prep_recv(self, root: int, length: int, share: float, wait: bool) -> None:
        name = self.name()
        answer = self.world.d.prep_recv(
            prompt(root, length), round(length * share), name=name, max_wait_s=4.0 if wait else None
        )
        self.preps.append((prompt(root, length), name, answer))

    def reserved(self, choice: int) -> tuple[tuple[int, ...], str, api.Reserved] | None:
        known = [(p, name, a.values[0]) for p, name, a in self.preps if a.values]
        usable = [(p, name, r) for p, name, r in known if isinstance(r, api.Reserved)]
        return usable[-1 - choice % min(3, len(usable))] if usable else None

    @rule(choice=st.integers(0, 9), attempt=st.integers(1, 3), cut=st.floats(0, 1), again=st.booleans())
    def remote_send(self, choice: int, attempt: int, cut: float, again: bool) -> None:
        if (found := self.reserved(choice)) is not None:
            tokens, _, reserved = found
            window = reserved.address.window
            begin = window.begin + round(len(window) * cut) if again else window.begin
            name = self.name()
            answer = self.world.p.remote_send(tokens, begin, window.end, reserved, name=name, attempt=attempt)
            self.sends.append((name, answer))

    @rule(choice=st.integers(0, 9), count=st.integers(1, 12), timeout=st.sampled_from([None, None, None, 2.0]),
          rate=st.sampled_from([None, None, 1]))  # fmt: skip
    def generate_reserved(self, choice: int, count: int, timeout: float | None, rate: int | None) -> None:
        if (found := self.reserved(choice)) is not None:
            tokens, _, reserved = found
            params = SamplingParams(max_tokens=count, prompt_logprobs=rate)
            deadline = None if timeout is None else self.world.clock.now + timeout
            end = reserved.address.window.end
            stream = self.world.d.generate(
                tokens, params, name=self.name(), reservation=ref_of(reserved), begin=end, deadline=deadline
            )
            self.streams.append((self.world.d, tokens, params, stream))

    @rule(choice=st.integers(0, 9), what=st.sampled_from(["release", "publish", "renew", "abort"]))
    def end_reservation(self, choice: int, what: str) -> None:
        if (found := self.reserved(choice)) is not None:
            _, name, reserved = found
            if what == "renew":
                self.others.append(self.world.d.renew(reserved, 3.0))
            elif what == "abort":
                self.others.append(self.world.d.abort(name))
            else:
                self.others.append(self.world.d.release(reserved, publish=what == "publish"))

    @rule(back=st.integers(0, 5))
    def cancel(self, back: int) -> None:
        if self.names > back:
            for node in self.world.nodes:
                node.cancel(f"call {self.names - back}")

    @rule(side=st.sampled_from("pd"), count=st.integers(1, 4))
    def step(self, side: str, count: int) -> None:
        for _ in range(count):
            (self.world.p if side == "p" else self.world.d).step()

    @rule(side=st.sampled_from("pd"))
    def serve(self, side: str) -> None:
        (self.world.p if side == "p" else self.world.d).service.pump()

    @precondition(lambda self: self.world.p.service.pushes)
    @rule(choice=st.integers(0, 9), whole=st.booleans())
    def move(self, choice: int, whole: bool) -> None:
        service = self.world.p.service
        pushes = list(service.pushes.values())
        push = pushes[choice % len(pushes)]
        service.max_layers = None if whole else push.num_layers + 1
        service.advance(push)
        service.max_layers = None

    @rule(seconds=st.sampled_from([0.1, 0.5, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.clock.now += seconds

    @rule(side=st.sampled_from("pd"), die=st.integers(0, 5))
    def crash(self, side: str, die: int) -> None:
        if die == 5:
            node = self.world.p if side == "p" else self.world.d
            node.service.crash()
            node.service.announce()

    @rule(rounds=st.integers(1, 12))
    def go_on(self, rounds: int) -> None:
        for _ in range(rounds):
            for node in self.world.nodes:
                node.step()
            self.world.network.pump()

    @invariant()
    def nothing_wrong_came_out(self) -> None:
        for node, tokens, params, stream in self.streams:
            expected = node.expected(tokens, len(stream.tokens), params)
            assert stream.tokens == expected
            told = stream.prompt_logprobs
            assert told == expected_scores(tokens)[: len(told)]
            is_all = params.prompt_logprobs is not None and (stream.tokens or stream.finish_reason == "LENGTH")
            assert not is_all or len(told) == len(tokens) - 1

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for _ in range(6):
            self.world.run()
            self.world.clock.now += LEASE_S
        self.world.run()
        answers = [*(a for *_, a in self.preps), *(a for _, a in self.sends), *self.others]
        assert not [answer for answer in answers if answer.is_open]
        for node, tokens, params, stream in self.streams:
            assert stream.has_ended
            if stream.finish_reason == api.FinishReason.LENGTH:
                count = min(params.max_tokens or 0, 30 - len(tokens))
                assert stream.tokens == node.expected(tokens, count, params)
            elif stream.error is not None:
                assert stream.error.reason != "STEP_FAILED"
        for *_, answer in self.preps:
            if isinstance(answer.values[0], ServiceError):
                assert answer.values[0].reason not in ("STEP_FAILED", "GRANT_CONFLICT")
        for node in self.world.nodes:
            assert node.core.next_timer() is None
            assert len(node.core._context.link._free_slots) == 2
        self.world.assert_idle()


def prompt(root: int, length: int) -> tuple[int, ...]:
    """Prompts of one root begin alike; from the tenth token they depend on their length."""
    return tuple((11 * root + 3 * i + (length % 3 if i > 9 else 0)) % VOCAB for i in range(length))


TestRandomWork = RandomWork.TestCase
TestRandomWork.settings = settings(max_examples=250, stateful_step_count=50, deadline=None, derandomize=True)
