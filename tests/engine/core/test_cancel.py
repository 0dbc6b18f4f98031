"""Whatever call goes at whatever moment, nothing leaks, and nothing is written into or read from recycled pages."""

from __future__ import annotations

import numpy as np
import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code
from tests.engine.core.test_transfer import THREE, assert_moved, generate, send
from tests.engine.core.world import World, at_once, events, prompt_of

PROMPT = prompt_of(20)


@pytest.mark.parametrize("num_events", range(24))
@pytest.mark.parametrize("victim", ["prep", "send", "generate", "release", "deadline"])
def test_cancelling_at_any_moment_leaks_nothing(victim: str, num_events: int) -> None:
    """All three verbs at once, one event at a time; after some number of them one call goes."""
    world, prompt = World(max_step_tokens=8), PROMPT
    world.network.moves_at_once = False
    world.p.generate(prompt[:6], THREE)
    world.run()
    prep = world.d.prep_recv(prompt, 19, name="prep")
    happening = events(world)
    for _ in range(2):
        next(happening)
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
        next(happening)
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
    assert len(world.p.core._context.link._free_slots) == 2


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


def test_pages_of_a_sequence_stay_fenced_until_its_grant_is_drained() -> None:
    world, prompt = World(), prompt_of(17)
    reserved = world.reserve(prompt, 17)
    send(world, prompt, reserved)
    stream = generate(world, prompt, reserved)
    world.d.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    assert len(world.d.service.requests) == 1, "the revoke is under way"
    pages = world.d.pages
    assert (pages.held, pages.quarantined) == (4, 1), "published pages stay in use, the last one has no user"
    world.run()
    world.assert_idle()


@at_once
def test_a_send_keeps_its_own_pages_when_others_publish_the_same_block() -> None:
    world, prompt = World(max_step_tokens=6), prompt_of(16)
    world.network.moves_at_once = False
    reserved = world.reserve(prompt, 12)
    world.p.service.max_layers = 0
    twin = world.p.generate(prompt[:7], forced=prompt[7:16])
    world.p.step()
    world.p.step()
    assert twin.tokens == [prompt[7]]
    sent = world.p.remote_send(prompt, 0, 12, reserved)
    world.p.step()  # both compute position 7 now, and the older one publishes its block first
    assert len(world.p.fake.plans[-1].segments) == 2
    world.p.run()
    for start in range(1, 4):
        world.p.generate(prompt_of(40, start=start), SamplingParams(max_tokens=8))
        world.p.run()
    world.p.service.max_layers = None
    world.run()
    assert sent.value.transferred_tokens == 12
    assert_moved(world, prompt, reserved)
