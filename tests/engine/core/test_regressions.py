"""Defects that were found by reading, each with the scenario that showed it."""

from __future__ import annotations

import threading

import pytest

from services.engine.core.generations import Generations
from services.engine.core.loop import EngineLoop
from services.engine.core.ports import PushSpec
from services.engine.core.timers import Timers
from services.engine.sampling.params import SamplingParams
from tests.engine.core.fake_runner import kv_of
from tests.engine.core.world import World, prompt_of, ref_of

ONE = SamplingParams(max_tokens=1)


def test_a_page_that_is_matched_in_part_is_not_pushed_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    base = prompt_of(8)
    world.p.generate((*base, 1), ONE)
    world.run()
    prompt = (*base[:6], 49, 48, 47, 46, 45, 44)  # a page and a half of it are cached
    reserved = world.reserve(prompt, 12)
    page_size, push, readable = 4, world.p.service.push, []

    def check_and_push(spec: PushSpec) -> None:
        if spec.ready_slot is None:
            skipped = spec.range.begin % page_size
            source = world.p.fake.memory[:, list(spec.page_ids)].reshape(3, -1)
            found = source[:, skipped : skipped + len(spec.range)]
            readable.append((found == kv_of(prompt, 3)[:, spec.range.begin : spec.range.end]).all())
        push(spec)

    monkeypatch.setattr(world.p.service, "push", check_and_push)
    world.p.remote_send(prompt, 0, 12, reserved)
    world.run()
    assert readable
    assert all(readable)
    stream = world.d.generate(prompt, SamplingParams(max_tokens=3), reservation=ref_of(reserved), begin=12)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)


def test_cached_pages_that_others_continue_are_not_counted_as_room() -> None:
    world = World(num_pages=8, max_context=16)
    receiver, sender = world.d, world.p
    shared = prompt_of(12)
    receiver.generate((*shared, 1), ONE)
    world.run()
    prompt = (*shared, 9, 8, 7, 6)
    reserved = world.reserve(prompt, 16)
    sender.remote_send(prompt, 12, 16, reserved)
    world.run()
    receiver.release(reserved, publish=True)
    receiver.run()
    world.network.moves_at_once = False  # the answer to Revoke is on its way
    other = prompt_of(16, start=3)
    target = sender.prep_recv(other, 16)
    for _ in range(4):
        sender.step()
        sender.service.pump()
    receiver.remote_send(other, 0, 16, target.value)
    receiver.step()
    receiver.step()
    receiver.generate(prompt_of(8, start=5), ONE)
    receiver.step()  # the loop lives
    world.network.moves_at_once = True
    world.run()


def test_a_lease_that_ends_while_a_start_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    prompt = prompt_of(8)
    reserved = world.reserve(prompt, 8, lease_s=5.0)
    world.p.remote_send(prompt, 0, 8, reserved)
    world.run()
    take_in = Generations._sequence

    def slowly(self: Generations, command: object) -> object:
        world.clock.now += 10
        return take_in(self, command)  # type: ignore[arg-type]

    monkeypatch.setattr(Generations, "_sequence", slowly)
    stream = world.d.generate(
        prompt, SamplingParams(max_tokens=2), reservation=ref_of(reserved), begin=8, deadline=world.clock() + 60
    )
    world.d.step()
    assert stream.error is not None
    assert stream.error.reason == "RESERVATION_GONE"
    monkeypatch.undo()
    world.clock.now += 100
    world.run()
    world.assert_idle()


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Timers()
    timers.at(1.0, lambda: None)
    for _ in range(10_000):
        timers.at(86_400.0, lambda: None).cancel()
    assert len(timers._heap) < 3_000


def test_the_loop_can_wait_for_the_most_distant_deadline() -> None:
    world = World()
    world.network.moves_at_once = False
    prompt = prompt_of(8)
    prepared = world.d.prep_recv(prompt, 8)
    for _ in range(4):
        world.d.step()
        world.d.service.pump()
    # A client may send any timeout that fits into a header.
    world.d.generate(prompt, ONE, reservation=ref_of(prepared.value), begin=8, deadline=4e11)
    world.d.step()
    loop = EngineLoop(world.d.core, world.d, clock=lambda: -4e11)
    wait_s = loop._wait_s()
    assert wait_s is not None
    assert wait_s <= threading.TIMEOUT_MAX
