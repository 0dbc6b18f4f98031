"""Retries change nothing; mismatches are refused before anything moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.engine.core import api
from services.protocol.errors import Code
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange
from tests.engine.core.answers import Answer
from tests.engine.core.test_transfer import THREE, assert_moved, generate, send
from tests.engine.core.world import World, at_once, prompt_of, ref_of

PROMPT = prompt_of(20)


def test_prep_recv_again_is_the_same_reservation() -> None:
    world = World()
    answers = [world.d.prep_recv(PROMPT, 19, name="one") for _ in range(2)]
    world.run()
    answers.append(world.d.prep_recv(PROMPT, 19, name="one", lease_s=5.0, max_wait_s=1.0))
    world.run()
    assert len({answer.value.address for answer in answers}) == 1
    assert len(world.d.reservations()) == 1
    other = world.d.prep_recv(PROMPT, 18, name="one")
    world.run()
    assert other.error.reason == "REQUEST_ID_REUSED"


def test_prep_recv_again_after_its_reservation_ended() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, name="one")
    world.d.release(reserved)
    world.run()
    late = world.d.prep_recv(PROMPT, 19, name="one")
    world.run()
    assert (late.error.code, late.error.reason) == (Code.ABORTED, "RESERVATION_GONE")


def test_prep_recv_again_after_a_refusal_may_succeed() -> None:
    world = World(num_pages=24, max_context=64)
    first = world.reserve(PROMPT, 19)
    refused = world.d.prep_recv(prompt_of(20, start=1), 16, name="one")
    world.run()
    assert (refused.error.reason, refused.error.code) == ("NO_PAGES", Code.RESOURCE_EXHAUSTED)
    assert refused.error.retry_delay_s
    world.d.release(first)
    world.run()
    assert world.reserve(prompt_of(20, start=1), 16, name="one").address.window == TokenRange(0, 16)


def test_remote_send_again_joins_and_reports_the_commit() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    answers = [world.p.remote_send(PROMPT, 0, 19, reserved, name="one") for _ in range(3)]
    world.run()
    answers.append(world.p.remote_send(PROMPT, 0, 19, reserved, name="one"))
    world.run()
    assert len({answer.value for answer in answers}) == 1
    assert world.d.service.moved_bytes == 19 * 8 * 3
    other = world.p.remote_send(PROMPT, 0, 18, reserved, name="one")
    world.run()
    assert other.error.reason == "REQUEST_ID_REUSED"


def test_an_attempt_that_was_committed_before_succeeds_at_once() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    send(world, PROMPT, reserved)
    again = send(world, PROMPT, reserved, attempt=2)
    assert again.transferred_bytes == 0
    world.d.release(reserved)
    world.run()
    world.assert_idle()


def test_a_committed_attempt_ends_the_computing_of_its_repetition() -> None:
    world, prompt = World(max_step_tokens=4), prompt_of(40)
    reserved = world.reserve(prompt, 40)
    world.d.generate(prompt, THREE)
    world.run()
    world.d.service, world.p.service = world.p.service, world.d.service
    first = world.d.remote_send(prompt, 0, 40, reserved)
    world.run()
    assert first.value.transferred_tokens == 40
    computed = world.p.fake.num_tokens_computed
    again = world.p.remote_send(prompt, 0, 40, reserved)
    world.run()
    assert again.value.transferred_bytes == 0
    assert world.p.fake.num_tokens_computed - computed <= 8


@at_once
def test_a_higher_attempt_takes_over() -> None:
    world, prompt = World(max_step_tokens=4), prompt_of(30)
    world.network.moves_at_once = False
    reserved = world.reserve(prompt, 30)
    world.p.service.max_layers = 1
    slow = world.p.remote_send(prompt, 0, 30, reserved)
    for _ in range(3):
        world.p.step()
        world.network.pump()
    fast = world.p.remote_send(prompt, 0, 30, reserved, attempt=2)
    world.p.step()
    world.network.pump()
    world.p.service.max_layers = None
    world.run()
    assert slow.error.reason == "ATTEMPT_SUPERSEDED"
    assert fast.value.transferred_tokens == 30
    assert_moved(world, prompt, reserved)
    stream = generate(world, prompt, reserved)
    world.run()
    assert stream.tokens == world.d.expected(prompt, 3)
    world.assert_idle()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_digest": b"other"}, "MODEL_MISMATCH"),
        ({"layout": PageLayout(3, 2, 1, 4, Dtype.FLOAT32)}, "LAYOUT_MISMATCH"),
        ({"layout": PageLayout(3, 1, 1, 4, Dtype.FLOAT8_E4M3)}, "LAYOUT_MISMATCH"),
        ({"prompt_digest": b"other"}, "PROMPT_MISMATCH"),
        ({"epoch": b"other"}, "STALE_EPOCH"),
        ({"secret": b"other"}, "WRONG_SECRET"),
        ({"reservation_id": "other"}, "RESERVATION_GONE"),
    ],
)
def test_an_address_that_does_not_fit_is_refused(change: dict[str, Any], reason: str) -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    wrong = replace(reserved, address=replace(reserved.address, **change))
    answer = world.p.remote_send(PROMPT, 0, 19, wrong)
    world.run()
    assert answer.error.reason == reason
    assert world.d.service.moved_bytes == 0
    send(world, PROMPT, reserved)
    world.d.release(reserved)
    world.run()
    world.assert_idle()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"range": TokenRange(0, 20)}, "OUTSIDE_WINDOW"),
        ({"range": TokenRange(0, 21)}, "INVALID_RANGE"),
        ({"prompt": (*PROMPT[:3], 1, *PROMPT[4:])}, "PROMPT_MISMATCH"),
        ({"prompt": PROMPT[:18], "range": TokenRange(0, 18)}, "PROMPT_MISMATCH"),
        ({"cache_salt": "tenant"}, "PROMPT_MISMATCH"),
        ({"attempt": 0}, "BAD_REQUEST"),
        ({"prompt": ()}, "EMPTY_PROMPT"),
        ({"deadline": 99.0}, "DEADLINE_EXCEEDED"),
    ],
)
def test_a_send_that_does_not_fit_is_refused(change: dict[str, Any], reason: str) -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    answer = world.p.remote_send(PROMPT, 0, 19, reserved, **change)
    world.run()
    assert answer.error.reason == reason
    world.p.assert_idle()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": prompt_of(20, start=1)}, "PROMPT_MISMATCH"),
        ({"prompt": PROMPT[:18], "begin": 18}, "PROMPT_MISMATCH"),
        ({"cache_salt": "tenant"}, "PROMPT_MISMATCH"),
        ({"begin": 20}, "INVALID_RANGE"),
    ],
)
def test_a_generation_that_does_not_fit_its_reservation(change: dict[str, Any], reason: str) -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    send(world, PROMPT, reserved)
    wrong = world.d.generate(PROMPT, **{"begin": 19, "reservation": ref_of(reserved), **change})
    secret = world.d.generate(PROMPT, reservation=api.ReservationRef(reserved.address.reservation_id, b"x"))
    world.run()
    assert (wrong.failure.reason, secret.failure.reason) == (reason, "WRONG_SECRET")
    stream = generate(world, PROMPT, reserved)
    second = generate(world, PROMPT, reserved)
    world.run()
    assert stream.tokens == world.d.expected(PROMPT, 3)
    assert second.failure.reason == "RESERVATION_GONE"
    world.assert_idle()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"end": 21}, "INVALID_RANGE"),
        ({"prompt": (), "end": 0}, "EMPTY_PROMPT"),
        ({"prompt": (99,), "end": 1}, "TOKEN_OUT_OF_RANGE"),
        ({"prompt": prompt_of(65), "end": 65}, "PROMPT_TOO_LONG"),
        ({"lease_s": 0.0}, "BAD_REQUEST"),
        ({"lease_s": float("nan")}, "BAD_REQUEST"),
        ({"max_wait_s": -1.0}, "BAD_REQUEST"),
    ],
)
def test_a_prep_recv_that_makes_no_sense(change: dict[str, Any], reason: str) -> None:
    world = World()
    answer = world.d.prep_recv(PROMPT, 19, **change)
    world.run()
    assert answer.error.reason == reason
    world.assert_idle()


def test_release_renew_and_abort_want_the_secret_or_the_owner() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19, name="one")
    forged = replace(reserved, address=replace(reserved.address, secret=b"x"))
    unknown = replace(reserved, address=replace(reserved.address, reservation_id="x"))
    answers: list[Answer[Any]] = [world.d.release(forged), world.d.renew(forged), world.d.release(unknown)]
    world.run()
    assert [a.error.reason for a in answers] == ["WRONG_SECRET", "WRONG_SECRET", "UNKNOWN_RESERVATION"]
    assert repr(reserved.address.secret) not in repr(reserved)
    assert world.d.abort("one").is_open
    world.run()
    late = world.d.release(forged)
    world.run()
    assert late.error.reason == "WRONG_SECRET"
    world.assert_idle()


def test_a_reservation_that_a_sequence_waits_for_is_no_other_ones() -> None:
    world = World()
    reserved = world.reserve(PROMPT, 19)
    first, second = (world.d.generate(PROMPT, THREE, reservation=ref_of(reserved), begin=19) for _ in range(2))
    world.run()
    assert second.failure.reason == "RESERVATION_GONE"
    send(world, PROMPT, reserved)
    assert first.tokens == world.d.expected(PROMPT, 3)
    world.assert_idle()


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_reservation_of_two_callers_ends_with_the_second(is_answered: bool) -> None:
    world = World()
    answers = [world.d.prep_recv(PROMPT, 19, name="one") for _ in range(2)]
    world.d.step()
    if is_answered:
        world.run()
    world.d.cancel("one")
    world.run()
    assert answers[0].value == answers[1].value
    assert len(world.d.reservations()) == 1
    world.d.cancel("one")
    world.run()
    world.assert_idle()
