"""Who needs a prefix that is on its way waits for it, for a while, holding nothing."""

from __future__ import annotations

from typing import Any

import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from tests.engine.core.answers import Answer
from tests.engine.core.world import PAGE_SIZE, Node, World, prompt_of, ref_of

PREFIX = prompt_of(24)
TWO = SamplingParams(max_tokens=2)
UNKNOWN_PACE_S = 1.0  # patience of an engine that has measured nothing: the clock stands still during its steps


def with_tail(number: int, length: int = 3) -> tuple[int, ...]:
    return (*PREFIX, *prompt_of(length, start=number + 1))


class Arriving:
    """A world in which PREFIX is on its way from P to D and goes no further than its first layer."""

    def __init__(self, **options: Any) -> None:
        self.world = World(**options)
        self.p, self.d = self.world.p, self.world.d
        self.reserved = self.world.reserve(PREFIX, len(PREFIX))
        self.p.service.max_layers = 1
        self.sent = self.p.remote_send(PREFIX, 0, len(PREFIX), self.reserved, name="send")
        self.world.run()
        assert [info.state for info in self.d.reservations()] == ["FILLING"]

    def arrive(self) -> None:
        self.p.service.max_layers = None
        self.world.run()

    def end(self) -> None:
        """Everything goes on, what was reserved is given back, and nothing is left."""
        self.arrive()
        self.d.release(self.reserved)
        self.world.run()
        self.world.assert_idle()


def test_requests_with_one_prefix_compute_it_once() -> None:
    world = World(max_step_tokens=10, num_pages=64)
    prompts = [with_tail(number) for number in range(8)]
    streams = [world.p.generate(prompt, TWO) for prompt in prompts]
    world.run()
    assert [stream.tokens for stream in streams] == [world.p.expected(prompt, 2) for prompt in prompts]
    assert world.p.fake.num_tokens_computed == len(PREFIX) + 8 * (3 + 1)
    world.assert_idle()


def test_a_generation_waits_for_what_a_peer_sends_and_holds_nothing() -> None:
    arriving = Arriving()
    held = arriving.d.pages.held
    streams = [arriving.d.generate(with_tail(number), TWO) for number in range(3)]
    arriving.world.run()
    assert (arriving.d.pages.held, arriving.d.fake.num_tokens_computed) == (held, 0)
    arriving.arrive()
    assert [stream.account.matched_tokens for stream in streams] == [len(PREFIX)] * 3
    assert [stream.tokens for stream in streams] == [arriving.d.expected(with_tail(n), 2) for n in range(3)]
    assert arriving.d.fake.num_tokens_computed == 3 * (3 + 1)
    arriving.end()


def test_patience_ends_and_the_generation_computes() -> None:
    arriving = Arriving()
    stream = arriving.d.generate(with_tail(0), TWO)
    arriving.world.run()
    assert arriving.d.core.next_timer() == arriving.world.clock.now + UNKNOWN_PACE_S
    arriving.world.clock.now += UNKNOWN_PACE_S
    arriving.world.run()
    assert (stream.account.matched_tokens, stream.tokens) == (0, arriving.d.expected(with_tail(0), 2))
    arriving.end()


def test_patience_is_as_long_as_computing_would_take_and_no_longer_than_the_limit() -> None:
    arriving = Arriving(max_prefix_wait_s=0.5)
    stream = arriving.d.generate(with_tail(0), TWO)
    arriving.world.run()
    assert arriving.d.core.next_timer() == arriving.world.clock.now + 0.5
    arriving.d.core._context.pace.step(100, 1.0)
    later = arriving.d.generate(with_tail(1), TWO)
    arriving.world.run()
    assert arriving.d.core.next_timer() == pytest.approx(arriving.world.clock.now + len(PREFIX) / 100)
    arriving.arrive()
    assert stream.account.matched_tokens == later.account.matched_tokens == len(PREFIX)
    arriving.end()


def cancel_send(arriving: Arriving) -> None:
    arriving.p.cancel("send")


def release(arriving: Arriving) -> None:
    arriving.d.release(arriving.reserved)


def lose_service(arriving: Arriving) -> None:
    arriving.d.service.crash()
    arriving.d.service.announce()


@pytest.mark.parametrize("fail", [cancel_send, release, lose_service])
def test_when_nothing_comes_of_it_the_generation_goes_on_at_once(fail: Any) -> None:
    arriving = Arriving()
    stream = arriving.d.generate(with_tail(0), TWO)
    arriving.world.run()
    assert not stream.has_ended
    fail(arriving)
    arriving.world.run()
    assert stream.tokens == arriving.d.expected(with_tail(0), 2)
    assert stream.account.matched_tokens == 0


def test_a_failed_step_of_the_one_who_computes_wakes_those_who_wait() -> None:
    world = World(max_step_tokens=8)
    first = world.p.generate(with_tail(0), TWO)
    world.p.step()
    second = world.p.generate(with_tail(1), TWO)
    world.p.step()
    world.p.fake.fail_next = RuntimeError("broken")
    world.run()
    assert first.failure.reason == "STEP_FAILED"
    assert second.tokens == world.p.expected(with_tail(1), 2)
    world.assert_idle()


def test_prep_recv_waits_and_then_has_less_sent() -> None:
    arriving = Arriving()
    prompt = with_tail(0)
    answer = arriving.d.prep_recv(prompt, len(prompt) - 1)
    retry = arriving.d.prep_recv(prompt, len(prompt) - 1, name="D request 2")
    other = arriving.d.prep_recv(prompt_of(8, start=9), 8)
    arriving.world.run()
    assert answer.is_open
    assert other.value.matched_tokens == 0, "nobody else is held up"
    assert arriving.d.pages.held == (24 + 8) // PAGE_SIZE
    assert retry.is_open
    arriving.world.clock.now += 0.5
    arriving.arrive()
    assert answer.value.matched_tokens == len(PREFIX)
    assert answer.value.timing.queue_s == 0.5
    arriving.d.release(answer.value)
    arriving.d.release(other.value)
    arriving.end()


def test_prep_recv_waits_for_what_is_computed_here_within_its_patience() -> None:
    world = World(max_step_tokens=8)
    stream = world.d.generate(with_tail(0), TWO)
    world.d.step()
    answers = [world.d.prep_recv(with_tail(n), len(PREFIX)) for n in (1, 2)]
    world.d.step()
    assert [answer.is_open for answer in answers] == [True, True]
    world.run()
    assert [answer.value.matched_tokens for answer in answers] == [len(PREFIX)] * 2
    assert stream.tokens == world.d.expected(with_tail(0), 2)


def test_the_patience_of_prep_recv_ends() -> None:
    arriving = Arriving(num_pages=32, max_context=64)
    with_room = arriving.d.prep_recv(with_tail(0), 26)
    without = arriving.d.prep_recv((*PREFIX, *prompt_of(40, start=3)), 60)
    cancelled = arriving.d.prep_recv(with_tail(1), 26, name="gone")
    arriving.world.run()
    arriving.d.cancel("gone")
    arriving.world.clock.now += UNKNOWN_PACE_S
    arriving.world.run()
    assert cancelled.error.reason == "REQUEST_CANCELLED"
    assert with_room.value.matched_tokens == 0
    assert without.error.reason == "NO_PAGES"
    arriving.d.release(with_room.value)
    arriving.end()


def test_prep_recvs_that_wait_hear_of_the_services_end() -> None:
    arriving = Arriving()
    answer = arriving.d.prep_recv(with_tail(0), 26)
    arriving.world.run()
    arriving.d.service.crash()
    arriving.world.run()
    assert answer.error.reason == "KVTRANSFER_GONE"


def test_a_send_waits_for_what_arrives_here() -> None:
    arriving = Arriving()
    third = arriving.world.join("E")
    prompt = with_tail(0)
    target = third.prep_recv(prompt, len(prompt))
    arriving.world.run()
    onward = arriving.d.remote_send(prompt, 0, len(prompt), target.value)
    arriving.world.run()
    assert onward.is_open
    arriving.arrive()
    assert (onward.value.matched_tokens, onward.value.computed_tokens) == (len(PREFIX), 3)
    stream = third.generate(prompt, TWO, reservation=ref_of(target.value), begin=len(prompt))
    arriving.world.run()
    assert stream.tokens == third.expected(prompt, 2)
    arriving.end()


def test_two_engines_that_wait_for_each_other_go_on() -> None:
    """Each is to send the other the second half, and waits for its own first half, which a third never finishes."""
    world = World()
    third = world.join("E")
    third.service.max_layers = 1
    half, end = 12, len(PREFIX)
    targets: list[api.Reserved] = []
    for number, node in enumerate((world.p, world.d)):
        answer: Answer[api.Reserved] = node.prep_recv(PREFIX, end)
        world.run()
        targets.append(answer.value)
        third.remote_send(PREFIX, 0, half, answer.value, name=f"half {number}")
    world.run()
    crossed: list[tuple[Node, api.Reserved]] = [(world.d, targets[0]), (world.p, targets[1])]
    sends = [node.remote_send(PREFIX, half, end, target) for node, target in crossed]
    world.run()
    assert [send.is_open for send in sends] == [True, True]
    world.clock.now += UNKNOWN_PACE_S
    world.run()
    assert [send.value.transferred_tokens for send in sends] == [end - half] * 2
    third.service.max_layers = None
    world.run()
    streams = [
        node.generate(PREFIX, TWO, reservation=ref_of(target), begin=end)
        for node, target in zip((world.p, world.d), targets, strict=True)
    ]
    world.run()
    assert [stream.tokens for stream in streams] == [world.p.expected(PREFIX, 2)] * 2
    world.assert_idle()
