"""What is refused, cancelled or late leaves with exactly one outcome, and the engine goes on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from services.engine.core import api
from services.engine.sampling.params import SamplingParams
from services.protocol.errors import Code
from tests.engine.core.answers import Answer, Clock
from tests.engine.core.world import GREEDY, Node, prompt_of


def node(**options: Any) -> Node:
    return Node(Clock(), None, "E", **options)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": ()}, "EMPTY_PROMPT"),
        ({"prompt": (1, 2, 50)}, "TOKEN_OUT_OF_RANGE"),
        ({"prompt": (1, -1)}, "TOKEN_OUT_OF_RANGE"),
        ({"prompt": prompt_of(64)}, "PROMPT_TOO_LONG"),
        ({"prompt": prompt_of(60), "forced": (1,) * 5}, "PROMPT_TOO_LONG"),
        ({"begin": 1}, "INVALID_RANGE"),
        ({"begin": 9}, "INVALID_RANGE"),
        ({"prompt_token_count": 9}, "INVALID_RANGE"),
        ({"forced": (50,)}, "TOKEN_OUT_OF_RANGE"),
        ({"sampling": SamplingParams(temperature=-1)}, "INVALID_SAMPLING"),
        ({"reservation": api.ReservationRef("x", b"y")}, "UNKNOWN_RESERVATION"),
        ({"deadline": 99.0}, "DEADLINE_EXCEEDED"),
    ],
)
def test_bad_requests_are_refused_and_the_engine_goes_on(change: dict[str, Any], reason: str) -> None:
    engine = node()
    good = engine.generate(prompt_of(8), SamplingParams(max_tokens=3))
    bad = engine.generate(prompt_of(8), **change)
    engine.run()
    assert bad.failure.reason == reason
    assert good.tokens == engine.expected(prompt_of(8), 3)
    engine.assert_idle()


def test_a_live_request_id_is_refused_without_harm() -> None:
    engine = node()
    first = engine.generate(prompt_of(8), SamplingParams(max_tokens=3), name="one")
    again = engine.generate(prompt_of(8), SamplingParams(max_tokens=3), name="one")
    other = engine.generate(prompt_of(9), SamplingParams(max_tokens=3), name="one")
    engine.run()
    assert (again.failure.code, other.failure.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert first.tokens == engine.expected(prompt_of(8), 3)
    repeated = engine.generate(prompt_of(8), SamplingParams(max_tokens=3), name="one")
    engine.run()
    assert repeated.tokens == first.tokens


def test_a_full_queue_refuses_with_a_delay() -> None:
    engine = node(max_waiting=2)
    streams = [engine.generate(prompt_of(8, start=n), SamplingParams(max_tokens=1)) for n in range(4)]
    engine.run()
    refused = [s.error for s in streams if s.error]
    assert [e.reason for e in refused] == ["QUEUE_FULL"] * 2
    assert all(e.retry_delay_s and e.code is Code.RESOURCE_EXHAUSTED for e in refused)
    engine.assert_idle()


def test_cancel_ends_a_sequence_and_leaves_its_pages_cached() -> None:
    engine = node()
    stream = engine.generate(prompt_of(20), name="one")
    waiting = engine.generate(prompt_of(20), name="two")
    for _ in range(4):
        engine.step()
    engine.cancel("one")
    engine.cancel("two")
    engine.cancel("unknown")
    engine.run()
    assert stream.finish_reason == waiting.finish_reason == api.FinishReason.CANCELLED
    assert 0 < len(stream.tokens) < 10
    engine.assert_idle()
    again = engine.generate(prompt_of(20), SamplingParams(max_tokens=1))
    engine.run()
    assert again.account.matched_tokens == 19


def test_abort_ends_a_sequence() -> None:
    engine = node()
    stream = engine.generate(prompt_of(20), name="one")
    engine.step()
    answers = [engine.abort("one"), engine.abort("never was")]
    engine.run()
    assert [answer.value for answer in answers] == [None, None]
    assert stream.finish_reason == api.FinishReason.CANCELLED


def test_a_deadline_ends_a_sequence() -> None:
    engine = node()
    stream = engine.generate(prompt_of(20), deadline=105.0)
    for _ in range(4):
        engine.step()
    assert engine.core.next_timer() == 105.0
    engine.clock.now = 105.0
    engine.run()
    assert stream.failure.code is Code.DEADLINE_EXCEEDED
    assert stream.account.generated_tokens == len(stream.tokens)
    assert engine.core.next_timer() is None
    engine.assert_idle()


def test_a_failed_step_answers_its_sequences_and_no_others() -> None:
    engine = node(max_batch_size=1)
    first = engine.generate(prompt_of(8), SamplingParams(max_tokens=3))
    second = engine.generate(prompt_of(9, start=1), SamplingParams(max_tokens=3))
    engine.step()
    engine.fake.fail_next = RuntimeError("the device is on fire")
    engine.run()
    assert (first.failure.code, first.failure.reason) == (Code.INTERNAL, "STEP_FAILED")
    assert "fire" not in str(first.failure)
    assert second.tokens == engine.expected(prompt_of(9, start=1), 3)
    engine.assert_idle()


def test_draining_takes_no_work_and_answers_when_the_last_has_ended() -> None:
    engine = node()
    stream = engine.generate(prompt_of(8), SamplingParams(max_tokens=3))
    engine.step()
    drained: Answer[None] = Answer()
    engine.inbox.append(api.Drain(drained))
    late = engine.generate(prompt_of(8))
    engine.step()
    assert late.failure.reason == "DRAINING"
    assert drained.is_open
    engine.run()
    assert stream.finish_reason == api.FinishReason.LENGTH
    assert drained.value is None
    assert engine.loads[-1].draining


def test_without_a_transfer_service_nothing_can_be_reserved_or_sent() -> None:
    engine = node()
    answer = engine.prep_recv(prompt_of(8), 8)
    engine.run()
    assert (answer.error.code, answer.error.reason) == (Code.FAILED_PRECONDITION, "NO_KVTRANSFER")


def test_stopping_answers_everything_open() -> None:
    engine = node()
    stream = engine.generate(prompt_of(8))
    engine.step()
    engine.core.stop()
    assert stream.failure.code is Code.UNAVAILABLE


def test_the_cache_is_watched() -> None:
    engine = node(num_pages=16, max_context=64)
    events: list[api.CacheEvent] = []
    engine.generate(prompt_of(16), SamplingParams(max_tokens=1))
    engine.run()
    engine.inbox.append(api.WatchCache(1, events.append))
    for start in range(1, 6):
        engine.generate(prompt_of(16, start=start), SamplingParams(max_tokens=1))
        engine.run()
    assert events[0].snapshot
    known = set(events[0].stored)
    assert len(known) == 4
    for before, event in pairwise(events):
        assert event.sequence == before.sequence + 1
        assert not known & set(event.stored)
        assert known >= set(event.removed)
        known = (known | set(event.stored)) - set(event.removed)
    late: list[api.CacheEvent] = []
    engine.inbox += [api.WatchCache(2, late.append), api.UnwatchCache(1)]
    engine.run()
    assert set(late[0].stored) == known
    num_events = len(events)
    engine.generate(prompt_of(16, start=9), GREEDY)
    engine.run()
    assert len(events) == num_events
    assert len(late) > 1
