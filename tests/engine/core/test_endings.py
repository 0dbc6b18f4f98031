"""Leases, cancels, deaths: whatever ends a call, nothing is written after free and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code
from tests.engine.core.test_transfer import THREE, assert_moved, generate, send
from tests.engine.core.world import World, prompt_of, ref_of

PROMPT = prompt_of(20)


def test_a_lease_ends_and_its_pages_wait_until_no_write_can_come() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, lease_s=5.0)
    assert reserved.lease_s == 5.0
    assert world.d.pages.held == 5
    world.clock.now += 5.0
    world.d.run()
    assert (world.d.pages.held, world.d.pages.quarantined) == (0, 5)
    assert world.d.core.load().reservations == 0
    world.run()
    assert world.d.pages.quarantined == 0
    late = [world.d.renew(reserved), world.d.release(reserved)]
    world.run()
    assert late[0].error.reason == "RESERVATION_GONE"
    assert late[1].value == 0
    answer = world.p.remote_send(PROMPT, 0, 19, reserved)
    world.run()
    assert answer.error.reason == "RESERVATION_GONE"
    world.assert_idle()


def test_a_lease_is_renewed_by_hand_and_by_writes() -> None:
    world, prompt = World(max_step_tokens=4), prompt_of(40)
    reserved = world.reserve(prompt, 40, lease_s=5.0)
    world.clock.now += 4.0
    renewed = world.d.renew(reserved, 6.0)
    world.run()
    assert renewed.value == 6.0
    world.clock.now += 5.0
    world.run()
    assert world.d.core.load().reservations == 1
    answer = world.p.remote_send(prompt, 0, 40, reserved)
    while answer.is_open:
        world.clock.now += 0.9  # longer than the lease in all, shorter between writes
        world.p.step()
        world.network.pump()
        world.d.step()
    assert answer.value.transferred_tokens == 40
    assert world.d.core.load().reservations == 1
    world.clock.now += 1000.0
    world.run()
    world.assert_idle()


def test_a_lease_is_no_longer_than_the_longest() -> None:
    world = World(max_lease_s=40.0)
    assert world.reserve(PROMPT, 19, lease_s=1e6).lease_s == 40.0


def test_waiting_for_kv_ends_with_the_lease() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, lease_s=5.0)
    stream = generate(world, PROMPT, reserved)
    world.run()
    world.clock.now += 5.0
    world.run()
    assert stream.error is not None
    assert (stream.error.code, stream.error.reason) == (Code.ABORTED, "RESERVATION_GONE")
    world.assert_idle()


def test_waiting_for_kv_ends_with_the_deadline_and_leaves_the_reservation() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    late = generate(world, PROMPT, reserved, deadline=103.0)
    world.run()
    world.clock.now = 103.0
    world.run()
    assert late.error is not None
    assert late.error.code is Code.DEADLINE_EXCEEDED
    send(world, PROMPT, reserved)
    again = generate(world, PROMPT, reserved)
    world.run()
    assert again.tokens == world.d.expected(PROMPT, 3)
    world.assert_idle()


def test_a_sequence_outlives_the_lease() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, lease_s=5.0)
    send(world, PROMPT, reserved)
    stream = world.d.generate(PROMPT, SamplingParams(max_tokens=30), reservation=ref_of(reserved))
    for _ in range(40):
        world.clock.now += 1.0
        world.d.step()
    world.run()
    assert stream.tokens == world.d.expected(PROMPT, 30)
    world.assert_idle()


@pytest.mark.parametrize("num_events", range(24))
@pytest.mark.parametrize("victim", ["prep", "send", "generate", "release", "deadline"])
def test_cancelling_at_any_moment_leaks_nothing(victim: str, num_events: int) -> None:
    """All three verbs at once, one event at a time; after some number of them one call goes."""
    world, prompt = World(max_step_tokens=8), PROMPT
    world.network.moves_at_once = False
    world.p.generate(prompt[:6], THREE)
    world.run()
    prep = world.d.prep_recv(prompt, 19, name="prep")
    events = _events(world)
    for _ in range(2):
        next(events)
    if victim == "prep" and num_events < 2:
        world.d.cancel("prep")
        world.run()
        assert prep.error.code is Code.CANCELLED
        world.assert_idle()
        return
    world.run()
    reserved = prep.value
    sent = world.p.remote_send(prompt, 0, 19, reserved, name="send", deadline=110.0)
    stream = generate(world, prompt, reserved, name="generate")
    for _ in range(num_events):
        next(events)
    if victim == "release":
        world.d.release(reserved)
    elif victim == "deadline":
        world.clock.now = 110.0
    elif victim == "prep":
        world.d.abort("prep")
    else:
        (world.p if victim == "send" else world.d).cancel(victim)
    world.run()
    assert not sent.is_open
    if not stream.has_ended:  # its sender is gone: only the lease ends it
        world.clock.now += 30.0
        world.run()
    assert stream.has_ended
    if stream.finish_reason == api.FinishReason.LENGTH:
        assert stream.tokens == world.d.expected(prompt, 3)
    world.clock.now += 30.0
    world.run()
    world.assert_idle()
    assert world.p.core.next_timer() is world.d.core.next_timer() is None
    assert world.p.core._context.link.num_free_slots == 2


def _events(world: World):  # type: ignore[no-untyped-def]
    """One thing after another, round and round."""
    while True:
        for happen in (world.p.step, world.d.step, world.p.service.pump, world.d.service.pump):
            happen()
            yield
        for push in list(world.p.service.pushes.values())[:1]:
            world.p.service.max_layers = push.num_layers + 1
            world.p.service.advance(push)
            world.p.service.max_layers = None
            yield


@pytest.mark.parametrize("revoke_comes_first", [True, False])
def test_a_late_write_never_reaches_recycled_pages(revoke_comes_first: bool) -> None:
    world, prompt = World(num_pages=22, max_context=64, max_step_tokens=64), PROMPT
    world.network.moves_at_once = False
    reserved = world.reserve(prompt, 20)
    world.p.service.max_layers = 1
    sent = world.p.remote_send(prompt, 0, 20, reserved)
    world.run()
    assert sent.is_open
    world.d.release(reserved)
    world.d.step()
    assert world.d.pages.quarantined == 5
    squatter = world.d.generate(prompt_of(40, start=5), SamplingParams(max_tokens=20))
    world.d.run()
    world.p.service.max_layers = None
    (push,) = world.p.service.pushes.values()
    for happen in (world.d.service.pump, lambda: world.p.service.advance(push))[:: 1 if revoke_comes_first else -1]:
        happen()
    world.run()
    if revoke_comes_first:
        assert sent.error.reason == "RESERVATION_GONE"
    else:
        assert sent.value.transferred_tokens == 20, "it was written into pages that are in quarantine"
    assert squatter.tokens == world.d.expected(prompt_of(40, start=5), 20)
    world.assert_idle()


def test_source_pages_stay_until_the_push_has_ended() -> None:
    world = World(num_pages=20, max_context=32)
    world.network.moves_at_once = False
    reserved = world.reserve(PROMPT, 20)
    world.p.service.max_layers = 1
    sent = world.p.remote_send(PROMPT, 0, 20, reserved, name="send")
    world.run()
    world.p.cancel("send")
    world.p.step()
    assert sent.error.code is Code.CANCELLED
    assert world.p.pages.held == 5
    before = world.p.fake.memory.copy()
    spec = next(iter(world.p.service.pushes.values())).spec
    for start in range(1, 4):
        world.p.generate(prompt_of(30, start=start), SamplingParams(max_tokens=1))
        world.p.run()
    pages = list(spec.page_ids)
    assert np.array_equal(world.p.fake.memory[:, pages], before[:, pages])
    world.run()
    world.d.release(reserved)
    world.run()
    world.assert_idle()


def test_cancel_between_pushes_ends_the_attempt() -> None:
    world, prompt = World(max_step_tokens=4), prompt_of(40)
    reserved = world.reserve(prompt, 40)
    world.p.remote_send(prompt, 0, 40, reserved, name="send")
    for _ in range(3):
        world.p.step()
        world.network.pump()
    world.p.step()
    world.p.cancel("send")
    world.run()
    (info,) = world.d.reservations()
    assert info.state == "RESERVED"
    send(world, prompt, reserved, attempt=2)
    assert_moved(world, prompt, reserved)
    world.d.release(reserved)
    world.run()
    world.assert_idle()


@pytest.mark.parametrize("side", ["p", "d"])
@pytest.mark.parametrize("num_events", [0, 2, 5, 9, 14, 30])
def test_the_death_of_a_transfer_service(side: str, num_events: int) -> None:
    world, prompt = World(max_step_tokens=8), PROMPT
    world.network.moves_at_once = False
    reserved = world.reserve(prompt, 19)
    whole = world.reserve(prompt_of(12, start=2), 12)
    send(world, prompt_of(12, start=2), whole)
    sent = world.p.remote_send(prompt, 0, 19, reserved)
    stream = generate(world, prompt, reserved)
    events = _events(world)
    for _ in range(num_events):
        next(events)
    node = world.p if side == "p" else world.d
    node.service.crash()
    world.run()
    assert not sent.is_open
    if sent.values and isinstance(sent.values[0], api.Timing):
        assert stream.tokens == world.d.expected(prompt, 3)
    elif side == "d":
        assert stream.error is not None
        assert stream.error.code is Code.ABORTED
    else:
        assert sent.error.code is Code.UNAVAILABLE
    refused = node.prep_recv(prompt, 19)
    world.run()
    assert refused.error.reason == "KVTRANSFER_GONE"
    again = generate(world, prompt_of(12, start=2), whole)
    world.run()
    assert again.tokens == world.d.expected(prompt_of(12, start=2), 3), "what was filled goes on"
    node.service.announce()
    fresh = world.reserve(prompt_of(9, start=4), 9)
    send(world, prompt_of(9, start=4), fresh)
    stream = generate(world, prompt_of(9, start=4), fresh)
    world.clock.now += 30.0
    world.run()
    world.assert_idle()


def test_a_grant_that_fails_fails_the_call() -> None:
    world = World()
    world.d.service.grant = lambda spec: world.d.inbox.append(  # type: ignore[method-assign]
        api.GrantFailed(spec.reservation_id, api.ServiceError("no"))
    )
    answer = world.d.prep_recv(PROMPT, 19)
    world.run()
    assert answer.error.message == "no"
    world.assert_idle()


def test_prep_recv_waits_for_pages_in_order_and_is_bounded() -> None:
    world = World(num_pages=24, max_context=64)
    first = world.reserve(PROMPT, 19)
    waiting = [world.d.prep_recv(prompt_of(20, start=n), 20, max_wait_s=10.0, name=f"w{n}") for n in range(1, 4)]
    refused = world.d.prep_recv(prompt_of(4, start=8), 4)
    world.run()
    assert [answer.is_open for answer in waiting] == [True] * 3
    assert refused.error.reason == "NO_PAGES", "nobody overtakes those who wait"
    world.clock.now += 3.0
    world.d.cancel("w1")
    world.d.release(first)
    world.run()
    assert waiting[0].error.code is Code.CANCELLED
    assert waiting[1].value.timing.queue_s == 3.0
    assert waiting[2].is_open
    world.clock.now += 7.0
    world.run()
    assert waiting[2].error.reason == "NO_PAGES"
    world.d.release(waiting[1].value)
    world.run()
    world.assert_idle()


def test_reservations_leave_room_for_a_longest_prompt() -> None:
    world = World(num_pages=32, max_context=64)  # 16 pages for one, 16 for reservations
    reserved = [world.reserve(prompt_of(16, start=n), 16) for n in range(4)]
    refused = world.d.prep_recv(prompt_of(16, start=4), 1)
    longest = world.d.generate(prompt_of(50, start=7))
    world.run()
    assert refused.error.reason == "NO_PAGES"
    assert len(longest.tokens) == 14
    for one in reserved:
        world.d.release(one)
    world.run()
    world.assert_idle()


def test_a_send_short_of_pages_is_refused_and_does_not_wait() -> None:
    world = World(num_pages=20, max_context=64)
    reserved = world.reserve(PROMPT, 8)
    running = world.p.generate(prompt_of(40, start=3), SamplingParams(max_tokens=20))
    for _ in range(5):
        world.p.step()
    more = world.p.generate(prompt_of(40, start=4), SamplingParams(max_tokens=20))
    sent = world.p.remote_send(prompt_of(20, start=0), 0, 8, reserved)
    world.p.step()
    assert (sent.error.code, sent.error.reason) == (Code.RESOURCE_EXHAUSTED, "NO_PAGES")
    assert sent.error.retry_delay_s
    world.run()
    assert running.tokens == world.p.expected(prompt_of(40, start=3), 20)
    assert more.tokens == world.p.expected(prompt_of(40, start=4), 20)


def test_fault_points_hold_fail_and_are_passed() -> None:
    passed: list[str] = []

    class Recording:
        def reach(self, point: str) -> None:
            if not point.startswith("step"):
                passed.append(point)

    world = World(faults=Recording())
    reserved = world.reserve(PROMPT, 19)
    send(world, PROMPT, reserved)
    generate(world, PROMPT, reserved)
    world.run()
    layers = [f"send.layer.{layer}" for layer in range(3)]
    assert passed == [
        "prep_recv.begin", "prep_recv.end", "remote_send.begin", *layers, *layers, "remote_send.end",
        "start_generate.begin", "start_generate.end",
    ]  # fmt: skip


@pytest.mark.parametrize("point", ["prep_recv.begin", "remote_send.begin", "send.layer.1", "start_generate.begin"])
def test_a_failure_at_a_point_is_answered(point: str) -> None:
    armed = [point]

    class Failing:
        def reach(self, point: str) -> None:
            if point in armed:
                armed.clear()
                raise RuntimeError("injected")

    world = World(faults=Failing())
    answers: list[Callable[[], object]] = []
    prep = world.d.prep_recv(PROMPT, 19)
    world.run()
    if point == "prep_recv.begin":
        assert prep.error.code is Code.INTERNAL
        return
    sent = world.p.remote_send(PROMPT, 0, 19, prep.value)
    world.run()
    if point in ("remote_send.begin", "send.layer.1"):
        assert sent.error.code is Code.INTERNAL
    stream = generate(world, PROMPT, prep.value)
    world.run()
    if point == "start_generate.begin":
        assert stream.error is not None
        assert stream.error.code is Code.INTERNAL
    world.clock.now += 60.0
    world.run()
    world.assert_idle()
    assert not answers
