"""Who gets pages when there are few (rule 6)."""

from __future__ import annotations

from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code
from tests.engine.core.answers import Clock
from tests.engine.core.test_transfer import THREE, send
from tests.engine.core.world import Node, World, at_once, prompt_of, ref_of

PROMPT = prompt_of(20)


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


def test_those_who_wait_for_room_count_as_reservations() -> None:
    world = World(num_pages=24, max_context=64, max_reservations=2)
    reserved = world.reserve(PROMPT, 19)
    waiting = world.d.prep_recv(prompt_of(20, start=1), 20, max_wait_s=10.0)
    refused = world.d.prep_recv(prompt_of(4, start=2), 4, max_wait_s=10.0)
    world.run()
    assert waiting.is_open
    assert refused.error.reason == "QUEUE_FULL"
    world.d.release(reserved)
    world.run()
    world.d.release(waiting.value)
    world.run()
    world.assert_idle()


def test_pages_in_quarantine_are_not_reserved_in_place_of_others() -> None:
    world = World(num_pages=32, max_context=64)
    reserved = [world.reserve(prompt_of(16, start=n), 16) for n in range(4)]
    world.d.release(reserved[0])
    early = world.d.prep_recv(prompt_of(16, start=4), 16)
    world.d.step()
    assert world.d.pages.quarantined == 4
    assert early.error.reason == "NO_PAGES"
    world.run()
    reserved[0] = world.reserve(prompt_of(16, start=4), 16)
    for one in reserved:
        world.d.release(one)
    world.run()
    world.assert_idle()


def test_cached_pages_that_several_reservations_pin_count_once() -> None:
    world = World(num_pages=32, max_context=64)
    world.d.generate(prompt_of(8), SamplingParams(max_tokens=1))
    world.run()
    prompts = [(*prompt_of(8), *prompt_of(length, start=length)) for length in (24, 32)]
    reserved = [world.reserve(prompt, len(prompt)) for prompt in prompts]  # 2 pages of both, 6 and 8 of each
    assert [one.matched_tokens for one in reserved] == [8, 8]
    for one in reserved:
        world.d.release(one)
    world.run()
    world.assert_idle()


@at_once
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


def test_a_sequence_as_long_as_the_pool_begins_though_a_page_matches_in_part() -> None:
    """The page and its copy would be one more than there are: it would wait for ever, and all behind it."""
    world = World(num_pages=4, max_context=64)
    before, within, at_the_end = prompt_of(15), (*prompt_of(10), 1, 2, 3, 4, 5), prompt_of(13)
    for prompt in (before, within, before, at_the_end):
        stream = world.p.generate(prompt)
        world.run()
        assert stream.tokens == world.p.expected(prompt, 16 - len(prompt))
    assert stream.account.matched_tokens == 12
    world.assert_idle()


def test_a_send_as_long_as_the_pool_goes_though_a_page_matches_in_part() -> None:
    world = World(num_pages=8, max_context=16)
    sender = world.join("S", num_pages=4, max_context=16)
    for prompt in (prompt_of(15), (*prompt_of(10), 1, 2, 3, 4, 5, 6)):
        reserved = world.reserve(prompt, len(prompt))
        window = reserved.address.window
        sent = sender.remote_send(prompt, window.begin, window.end, reserved)
        world.run()
        assert sent.value.transferred_tokens == len(window)
        world.d.release(reserved)
        world.run()
    world.assert_idle()


@at_once
def test_nothing_is_reserved_that_the_oldest_waiting_sequence_lacks() -> None:
    world = World(num_pages=24, max_context=40, max_step_tokens=128)
    streams = [world.d.generate(prompt_of(34, start=n), SamplingParams(max_tokens=6)) for n in range(3)]
    world.d.step()
    assert [len(s.tokens) for s in streams] == [1, 1, 0]
    free = world.d.pages.free
    refused = world.d.prep_recv(prompt_of(16, start=5), 16)
    world.d.step()
    assert free >= 4, "it would fit, but the third sequence was here first"
    assert refused.error.reason == "NO_PAGES"
    world.run()
    assert [s.finish_reason for s in streams] == ["LENGTH"] * 3
    world.reserve(prompt_of(16, start=5), 16)


def test_who_waits_is_not_given_what_the_running_want_next() -> None:
    engine = Node(Clock(), None, "E", num_pages=5, max_context=20)  # two prompts, and a page
    streams = [engine.generate(prompt_of(8, start=n), SamplingParams(max_tokens=4)) for n in (0, 20)]
    engine.run()
    assert [stream.tokens for stream in streams] == [engine.expected(prompt_of(8, start=n), 4) for n in (0, 20)]
    assert [stream.account.preemptions for stream in streams] == [0, 0]
    engine.assert_idle()


def test_a_sequence_that_is_taken_out_of_the_step_that_it_was_put_into() -> None:
    """Its KV came late, so the older one has its prompt computed while the younger one decodes."""
    world = World(num_pages=12, max_context=44)
    prompt, other = prompt_of(40), prompt_of(8, start=20)
    reserved = world.reserve(prompt, 4)
    older = world.d.generate(prompt, THREE, reservation=ref_of(reserved), begin=4)
    younger = world.d.generate(other, SamplingParams(max_tokens=20))
    while len(younger.tokens) < 4:
        world.d.step()
    send(world, prompt, reserved)
    world.run()
    assert older.tokens == world.d.expected(prompt, 3)
    assert younger.tokens == world.d.expected(other, 20)
    assert (older.account.preemptions, younger.account.preemptions) == (0, 1)
    world.assert_idle()
