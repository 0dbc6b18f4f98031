"""PrepRecv, RemoteSend, StartGenerate over two cores: disaggregated equals single, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from services.protocol.timing import Timing
from tests.engine.core.answers import Stream
from tests.engine.core.fake_runner import kv_of
from tests.engine.core.world import PAGE_SIZE, World, at_once, prompt_of, ref_of

THREE = SamplingParams(max_tokens=3)


def send(world: World, prompt: Sequence[int], reserved: api.Reserved, **options: Any) -> Timing:
    window = reserved.address.window
    answer = world.p.remote_send(prompt, window.begin, window.end, reserved, **options)
    world.run()
    return answer.value


def generate(world: World, prompt: Sequence[int], reserved: api.Reserved, **options: Any) -> Stream:
    begin = reserved.address.window.end
    return world.d.generate(prompt, THREE, reservation=ref_of(reserved), begin=begin, **options)


def assert_moved(world: World, prompt: Sequence[int], reserved: api.Reserved) -> None:
    """D's pages hold the KV of the window, exactly."""
    window, layers = reserved.address.window, len(world.d.fake.memory)
    offset = window.begin % PAGE_SIZE
    moved = world.d.fake.read(reserved.address.shards[0].page_ids, offset + len(window))[:, offset:]
    assert np.array_equal(moved, kv_of(prompt, layers)[:, window.begin : window.end])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 17, 40])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_balanced_and_disaggregated_equal_single(length: int, share: float) -> None:
    world, prompt = World(), prompt_of(length)
    end = round((length - 1) * share) if share < 1 else length
    reserved = world.reserve(prompt, end)
    timing = send(world, prompt, reserved)
    assert timing.transferred_tokens == end
    assert timing.transferred_bytes == world.d.service.moved_bytes == end * 8 * 3
    assert_moved(world, prompt, reserved)
    computed = world.d.fake.num_tokens_computed
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    assert world.d.fake.num_tokens_computed - computed == max(1, length - end) + 2
    assert stream.account.transferred_tokens == end
    assert stream.account.transferred_bytes == timing.transferred_bytes
    world.assert_idle()


def test_context_aware_sends_only_what_is_missing() -> None:
    world, prompt = World(), prompt_of(30)
    world.d.generate(prompt[:18], SamplingParams(max_tokens=1))
    world.run()
    reserved = world.reserve(prompt, 29)
    assert reserved.matched_tokens == reserved.address.window.begin == 16
    send(world, prompt, reserved)
    assert_moved(world, prompt, reserved)
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    assert (stream.account.matched_tokens, stream.account.transferred_tokens) == (16, 13)
    world.assert_idle()


def test_a_partly_matched_page_is_copied_before_its_rest_arrives() -> None:
    world, prompt = World(), prompt_of(30)
    cached = (*prompt[:18], *prompt_of(14, start=3))
    first = world.d.generate(cached, THREE)
    world.run()
    reserved = world.reserve(prompt, 29)
    assert reserved.matched_tokens == 18
    send(world, prompt, reserved)
    assert_moved(world, prompt, reserved)
    stream = generate(world, prompt, reserved)
    again = world.d.generate(cached, THREE)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    assert again.tokens == first.tokens
    world.assert_idle()


@pytest.mark.parametrize("end", [15, 16])
def test_a_fully_cached_prompt_needs_no_sending(end: int) -> None:
    world, prompt = World(), prompt_of(16)
    world.d.generate(prompt, THREE)
    world.run()
    reserved = world.reserve(prompt, end)
    assert reserved.matched_tokens == end
    assert not reserved.address.window
    timing = send(world, prompt, reserved)
    assert timing.transferred_bytes == 0
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    world.assert_idle()


def test_what_the_sender_has_cached_is_not_computed_again() -> None:
    world, prompt = World(), prompt_of(40)
    world.p.generate(prompt, SamplingParams(max_tokens=1))
    world.run()
    computed = world.p.fake.num_tokens_computed
    reserved = world.reserve(prompt, 39)
    timing = send(world, prompt, reserved)
    assert (timing.matched_tokens, timing.computed_tokens) == (39, 0)
    assert world.p.fake.num_tokens_computed == computed
    assert_moved(world, prompt, reserved)


def test_a_page_that_the_sender_has_cached_in_part_moves_when_it_is_copied() -> None:
    world, prompt = World(), prompt_of(30)
    world.p.generate((*prompt[:18], *prompt_of(14, start=3)), SamplingParams(max_tokens=1))
    world.run()
    reserved = world.reserve(prompt, 29)
    timing = send(world, prompt, reserved)
    assert (timing.matched_tokens, timing.computed_tokens) == (18, 11)
    assert_moved(world, prompt, reserved)


def test_generate_may_be_called_before_anything_arrived() -> None:
    world, prompt = World(), prompt_of(20)
    reserved = world.reserve(prompt, 19)
    stream = generate(world, prompt, reserved)
    world.run()
    assert not stream.tokens
    assert world.d.core.load().waiting_for_kv == 1
    world.clock.now += 2.0
    send(world, prompt, reserved)
    assert stream.tokens == world.d.expected(prompt, 3)
    assert stream.account.transfer_s == 2.0
    world.assert_idle()


def test_layers_arrive_while_later_ones_compute() -> None:
    world, prompt = World(), prompt_of(12)
    reserved = world.reserve(prompt, 12)
    seen: list[int] = []
    raise_ready = world.p.service.raise_ready

    def look(slot: int, layers: int) -> None:
        raise_ready(slot, layers)
        if layers:
            page = reserved.address.shards[0].page_ids[0]
            seen.append(int((world.d.fake.memory[:, page, 0] != -1).sum()))
            assert (world.p.fake.memory[layers:, :, 0] == -1).all(), "later layers are not computed yet"

    world.p.service.raise_ready = look  # type: ignore[method-assign]
    send(world, prompt, reserved)
    assert seen == [1, 2, 3]


@at_once
def test_without_free_ready_slots_pieces_follow_their_steps() -> None:
    world, prompts = World(max_step_tokens=64), [prompt_of(9, start=n) for n in range(5)]
    world.network.moves_at_once = False
    reserved = [world.reserve(prompt, 9) for prompt in prompts]
    answers = [world.p.remote_send(p, 0, 9, r) for p, r in zip(prompts, reserved, strict=True)]
    world.p.step()
    pushes = [push.spec for push in world.p.service.pushes.values()]
    assert sorted(str(spec.ready_slot) for spec in pushes) == ["0", "1", "None", "None", "None"]
    world.run()
    for prompt, where, answer in zip(prompts, reserved, answers, strict=True):
        assert answer.value.transferred_tokens == 9
        assert_moved(world, prompt, where)
    for where in reserved:
        world.d.release(where)
    world.run()
    world.assert_idle()


@at_once
def test_a_send_keeps_its_pages_when_the_same_blocks_arrive_from_elsewhere() -> None:
    world, prompt = World(max_step_tokens=8), prompt_of(16)
    there, here = world.reserve(prompt, 16), world.p.prep_recv(prompt, 16)
    world.run()
    world.network.moves_at_once = False
    sent = world.p.remote_send(prompt, 0, 16, there)
    world.p.step()
    source = world.join("S")
    source.remote_send(prompt, 0, 16, here.value)
    while source.step() or source.service.pushes:
        for push in list(source.service.pushes.values()):
            source.service.advance(push)
    # Filled before the rest of the send is computed; then poisoned, if the send let go of its pages.
    world.p.step()
    world.p.step()
    world.run()
    assert sent.value.transferred_tokens == 16
    assert_moved(world, prompt, there)


def test_migration_publishes_what_arrived() -> None:
    world, prompt = World(), prompt_of(22)
    reserved = world.reserve(prompt, 22)
    send(world, prompt, reserved)
    released = world.d.release(reserved, publish=True)
    world.run()
    assert released.value == 20
    assert world.d.release(reserved).is_open
    stream = world.d.generate(prompt, THREE)
    world.run()
    assert stream.account.matched_tokens == 20
    assert stream.tokens == world.d.expected(prompt, 3)
    world.assert_idle()


def test_what_was_cached_before_a_migration_is_not_published_by_it() -> None:
    world, prompt = World(), prompt_of(22)
    world.d.generate(prompt[:10], SamplingParams(max_tokens=1))
    world.run()
    reserved = world.reserve(prompt, 22)
    assert reserved.matched_tokens == 8
    send(world, prompt, reserved)
    released = world.d.release(reserved, publish=True)
    world.run()
    assert released.value == 12


def test_several_senders_fill_disjoint_ranges() -> None:
    world, prompt = World(), prompt_of(24)
    reserved = world.reserve(prompt, 24)
    early = world.p.remote_send(prompt, 0, 10, reserved)
    late = world.p.remote_send(prompt, 10, 24, reserved)
    world.run()
    assert early.value.transferred_tokens + late.value.transferred_tokens == 24
    assert_moved(world, prompt, reserved)
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    world.assert_idle()


def test_a_reservation_is_readable_once_it_is_filled_and_not_before() -> None:
    world, prompt = World(), prompt_of(20)
    reserved = world.reserve(prompt, 20)
    early = world.d.generate(prompt[:12], SamplingParams(max_tokens=1))
    world.run()
    assert early.account.matched_tokens == 0
    send(world, prompt, reserved)
    other = world.d.generate(prompt, THREE)
    world.run()
    assert (other.account.matched_tokens, other.account.computed_tokens) == (19, 1)
    assert other.tokens == world.d.expected(prompt, 3)
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == other.tokens
    world.assert_idle()


def test_preempting_a_sequence_that_was_sent_its_kv() -> None:
    world = World(num_pages=24, max_context=56, max_batch_size=8)
    prompts = [prompt_of(15, start=n) for n in range(2)]
    params = SamplingParams(max_tokens=40)
    reservations = [world.reserve(prompt, 14) for prompt in prompts]
    for prompt, reserved in zip(prompts, reservations, strict=True):
        send(world, prompt, reserved)
    first = world.d.generate(prompt_of(10, start=9), params)
    streams = [
        world.d.generate(prompt, params, reservation=ref_of(reserved), begin=14)
        for prompt, reserved in zip(prompts, reservations, strict=True)
    ]
    world.run()
    assert [s.tokens for s in streams] == [world.d.expected(p, 40) for p in prompts]
    assert first.tokens == world.d.expected(prompt_of(10, start=9), 40)
    assert sum(s.timing.preemptions for s in streams if s.timing) > 0
    world.assert_idle()
