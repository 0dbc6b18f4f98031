"""Leases are durations: they end, are renewed, and only start what frees the pages."""

from __future__ import annotations

from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code
from tests.engine.core.test_transfer import generate, send
from tests.engine.core.world import World, at_once, prompt_of, ref_of

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
    renewed, released = world.d.renew(reserved), world.d.release(reserved)
    world.run()
    assert renewed.error.reason == "RESERVATION_GONE"
    assert released.value == 0
    answer = world.p.remote_send(PROMPT, 0, 19, reserved)
    world.run()
    assert answer.error.reason == "RESERVATION_GONE"
    world.assert_idle()


@at_once
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


def test_a_lease_begins_when_the_window_is_open() -> None:
    world = World()
    answer = world.d.prep_recv(PROMPT, 19, lease_s=5.0)
    world.d.step()
    world.clock.now += 3.0
    world.run()
    assert answer.value.lease_s == 5.0
    world.clock.now += 4.0
    world.run()
    assert [info.lease_remaining_s for info in world.d.reservations()] == [1.0]


def test_waiting_for_kv_ends_with_the_lease() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, lease_s=5.0)
    stream = generate(world, PROMPT, reserved)
    world.run()
    world.clock.now += 5.0
    world.run()
    assert (stream.failure.code, stream.failure.reason) == (Code.ABORTED, "RESERVATION_GONE")
    world.assert_idle()


def test_waiting_for_kv_ends_with_the_deadline_and_leaves_the_reservation() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    late = generate(world, PROMPT, reserved, deadline=103.0)
    world.run()
    world.clock.now = 103.0
    world.run()
    assert late.failure.code is Code.DEADLINE_EXCEEDED
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


def test_no_send_is_longer_than_the_longest() -> None:
    world = World(max_send_s=5.0)
    reserved = world.reserve(PROMPT, 19)
    world.network.moves_at_once = False
    sent = world.p.remote_send(PROMPT, 0, 19, reserved, deadline=1000.0)
    world.p.step()
    world.clock.now += 5.0
    world.p.step()
    assert sent.error.code is Code.DEADLINE_EXCEEDED
