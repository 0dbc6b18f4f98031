"""Release with publish: what a sender was told to be committed is published, whatever its receiver has heard of it.

A transfer service tells its engine of commits by a stream of its own, which nothing orders before the sender's reply.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.engine.core import api
from services.engine.errors import EngineStopped
from services.engine.sampling.params import SamplingParams
from services.protocol.ranges import RangeSet, TokenRange
from tests.engine.core.test_transfer import generate, send
from tests.engine.core.world import World, prompt_of

PROMPT = prompt_of(22)
WHOLE = 20  # what full pages hold of it


class Held:
    """A world whose receiver hears nothing of what is committed before a test says so."""

    def __init__(self, prompt: Sequence[int] = PROMPT) -> None:
        self.world = World()
        self.d = self.world.d
        self.news: list[api.Command] = []
        self.d.service.submit = self._submit
        self.reserved = self.world.reserve(prompt, len(prompt))

    def _submit(self, command: api.Command) -> None:
        (self.news if isinstance(command, api.GrantProgress) else self.d.inbox).append(command)

    def hear(self) -> None:
        self.d.inbox.extend(self.news)
        self.news.clear()

    def matched(self) -> int:
        stream = self.d.generate(PROMPT, SamplingParams(max_tokens=3))
        self.world.run()
        assert stream.tokens == self.d.expected(PROMPT, 3)
        self.world.assert_idle()
        return stream.account.matched_tokens


def test_what_its_sender_has_reported_is_published_unheard_of() -> None:
    held = Held()
    assert send(held.world, PROMPT, held.reserved).transferred_tokens == 22
    released = held.d.release(held.reserved, publish=True)
    held.world.run()
    assert released.value == WHOLE
    again = held.d.release(held.reserved, publish=True)
    held.d.run()
    assert again.value == WHOLE
    assert held.matched() == WHOLE


def test_the_answer_waits_for_the_fence_and_others_join_it() -> None:
    held = Held()
    send(held.world, PROMPT, held.reserved)
    released = [held.d.release(held.reserved, publish=publish) for publish in (True, True, False)]
    held.d.run()
    assert all(answer.is_open for answer in released)
    assert (held.d.pages.held, held.d.pages.quarantined) == (6, 0)
    late, renewed = generate(held.world, PROMPT, held.reserved), held.d.renew(held.reserved)
    held.d.run()
    assert late.failure.reason == renewed.error.reason == "RESERVATION_GONE"
    held.world.run()
    assert [answer.value for answer in released] == [WHOLE] * 3
    assert held.matched() == WHOLE


def test_what_is_heard_before_the_fence_answers_is_enough() -> None:
    held = Held()
    send(held.world, PROMPT, held.reserved)
    released = held.d.release(held.reserved, publish=True)
    held.d.run()
    held.hear()
    held.d.run()
    assert released.value == WHOLE
    held.world.run()
    assert held.matched() == WHOLE


def test_a_part_is_not_published() -> None:
    held = Held()
    sent = held.world.p.remote_send(PROMPT, 0, 12, held.reserved)
    held.world.run()
    assert sent.value.transferred_tokens == 12
    released = held.d.release(held.reserved, publish=True)
    held.world.run()
    assert released.value == 0
    assert held.matched() == 0


def test_a_sender_that_is_at_work_is_fenced_out() -> None:
    held = Held()
    held.world.p.service.max_layers = 1
    sent = held.world.p.remote_send(PROMPT, 0, 22, held.reserved)
    held.world.run()
    released = held.d.release(held.reserved, publish=True)
    held.world.run()
    assert released.value == 0
    held.world.p.service.max_layers = None
    held.world.run()
    assert sent.error.reason == "RESERVATION_GONE"
    assert held.matched() == 0


def test_one_that_waits_for_the_kv_hears_of_the_release_at_once() -> None:
    held = Held()
    stream = generate(held.world, PROMPT, held.reserved)
    held.d.run()
    released = held.d.release(held.reserved, publish=True)
    held.d.run()
    assert stream.failure.reason == "RESERVATION_GONE"
    assert released.is_open
    held.world.run()
    assert released.value == 0


@pytest.mark.parametrize("how", ["lease", "abort", "service"])
def test_an_end_before_the_fence_answers_publishes_nothing(how: str) -> None:
    held = Held()
    other = held.world.reserve(PROMPT[:8], 8, name="other", lease_s=5.0)
    send(held.world, PROMPT[:8], other)
    released = held.d.release(other, publish=True)
    held.d.run()
    assert released.is_open
    if how == "lease":
        held.world.clock.now += 5.0
    elif how == "abort":
        held.d.abort("other")
    else:
        held.d.service.crash()
    held.d.run()
    assert released.value == 0
    held.hear()
    held.d.inbox.append(api.GrantDrained("nobody's", RangeSet.of([TokenRange(0, 8)])))
    held.world.run()
    held.d.release(held.reserved)
    held.world.run()
    assert held.matched() == 0


def test_an_engine_that_stops_answers() -> None:
    held = Held()
    released = held.d.release(held.reserved, publish=True)
    held.d.run()
    held.d.core.stop()
    assert isinstance(released.error, EngineStopped)
