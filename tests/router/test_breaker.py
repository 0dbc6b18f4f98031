"""The breaker of an engine: what opens it, what never does, and how it closes."""

from __future__ import annotations

import asyncio
import time

import pytest
from microserve.router.v1 import admin_pb2
from prometheus_client import REGISTRY

from services.engine.errors import BadRequest, EngineDraining, NoPages, StepFailed
from services.engine.errors import DeadlineExceeded as EngineDeadline
from services.protocol.errors import Code, ReservationGone, ServiceError
from services.router.errors import BreakerOpen, EngineLost, PolicyFailed, RequestTimeout, SlowConsumer
from services.router.fleet.breaker import Breaker, BreakerCall, BreakerConfig, BreakerState
from services.rpc.status import RemoteError
from tests.fakes import FakeBug, FakeError, FakeLoss, Fault
from tests.router.harness import PROMPT, failing, model, running

LOSS = FakeLoss("the connection broke")


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker_of(num_failures: int = 3) -> tuple[Breaker, Clock]:
    clock = Clock()
    return Breaker("e:1", BreakerConfig(num_failures, first_s=1.0, longest_s=4.0), clock), clock


def call(breaker: Breaker, error: BaseException | None = None) -> None:
    try:
        with BreakerCall(breaker):
            if error is not None:
                raise error
    except BaseException as raised:
        if raised is not error:
            raise


def test_it_opens_tries_once_and_closes() -> None:
    breaker, clock = breaker_of()
    for _ in range(3):
        assert breaker.state is BreakerState.CLOSED
        call(breaker, LOSS)
    assert (breaker.state, breaker.admits) == (BreakerState.OPEN, False)
    with pytest.raises(BreakerOpen):
        call(breaker)
    clock.now += 1.0
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, True)
    with BreakerCall(breaker):
        assert not breaker.admits  # one at a time
    assert breaker.state is BreakerState.CLOSED


def test_a_trial_that_hangs_holds_up_no_later_one() -> None:
    breaker, clock = breaker_of(1)
    call(breaker, LOSS)
    clock.now += 1.0
    with BreakerCall(breaker):
        breaker.reset()  # the engine has restarted
        call(breaker, LOSS)
        clock.now += 1.0
        assert breaker.admits
        with BreakerCall(breaker):
            assert not breaker.admits


def test_a_trial_that_became_a_long_call_ends_no_later_one() -> None:
    breaker, clock = breaker_of(1)
    call(breaker, LOSS)
    clock.now += 1.0
    long_call = BreakerCall(breaker)
    long_call.__enter__()()
    assert breaker.state is BreakerState.CLOSED
    call(breaker, LOSS)
    clock.now += 1.0
    with BreakerCall(breaker):
        long_call.__exit__(None, None, None)
        assert not breaker.admits


def test_a_long_call_that_goes_well_hides_no_failures() -> None:
    breaker, _ = breaker_of()
    with BreakerCall(breaker) as succeeded:
        for _ in range(3):
            call(breaker, LOSS)
            succeeded()  # with every token
        assert breaker.state is BreakerState.CLOSED  # the first was news
        call(breaker, LOSS)
        assert breaker.state is BreakerState.OPEN
        succeeded()
    assert breaker.state is BreakerState.OPEN


def test_a_failed_trial_opens_it_for_longer_up_to_a_limit() -> None:
    breaker, clock = breaker_of(1)
    call(breaker, LOSS)
    for open_s in (1.0, 2.0, 4.0, 4.0):
        clock.now += open_s - 0.01
        assert breaker.state is BreakerState.OPEN
        clock.now += 0.01
        assert breaker.state is BreakerState.HALF_OPEN
        call(breaker, LOSS)
    clock.now += 4.0
    call(breaker)
    call(breaker, LOSS)
    clock.now += 1.0  # and with a success all is as at first
    assert breaker.state is BreakerState.HALF_OPEN


def test_calls_that_began_before_it_opened_do_not_open_it_longer() -> None:
    breaker, clock = breaker_of(1)
    calls = [BreakerCall(breaker) for _ in range(3)]
    for each in calls:
        each.__enter__()
    for each in calls:
        assert not each.__exit__(FakeLoss, LOSS, None)
    clock.now += 1.0
    assert breaker.state is BreakerState.HALF_OPEN


def test_a_call_that_began_before_it_opened_does_not_close_it() -> None:
    breaker, _ = breaker_of(1)
    with BreakerCall(breaker):
        call(breaker, LOSS)
    assert breaker.state is BreakerState.OPEN


def test_a_trial_without_a_verdict_leaves_room_for_the_next() -> None:
    breaker, clock = breaker_of(1)
    call(breaker, LOSS)
    clock.now += 1.0
    call(breaker, asyncio.CancelledError())
    assert (breaker.state, breaker.admits) == (BreakerState.HALF_OPEN, True)


def test_a_success_that_shows_early_counts_at_once() -> None:
    breaker, clock = breaker_of(1)
    call(breaker, LOSS)
    clock.now += 1.0
    with BreakerCall(breaker) as succeeded:
        succeeded()
        assert breaker.state is BreakerState.CLOSED


@pytest.mark.parametrize("error", [LOSS, FakeBug("broken"), StepFailed("numbers"), EngineLost("gone")])
def test_failures_of_the_engine_open_it(error: ServiceError) -> None:
    breaker, _ = breaker_of(1)
    call(breaker, error)
    assert breaker.state is BreakerState.OPEN


@pytest.mark.parametrize(
    "error",
    [
        BadRequest("nonsense"),
        NoPages("full"),
        FakeError("full"),
        EngineDraining("bye"),
        RemoteError(Code.DATA_LOSS, "CHECKSUM_MISMATCH", "altered on the way"),
        EngineDeadline("late"),
        ReservationGone("expired"),
        RequestTimeout("late"),
        SlowConsumer("asleep"),
        PolicyFailed("raised"),
        RuntimeError("a program's"),
        asyncio.CancelledError(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_clients_do_never_opens_it(error: BaseException) -> None:
    breaker, _ = breaker_of(1)
    for _ in range(5):
        call(breaker, error)
    assert breaker.state is BreakerState.CLOSED


async def test_a_broken_engine_is_left_alone_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    async with running(2, breaker_failures=3, breaker_first=60.0) as suite:
        suite.first.faults["StartGenerate"] = Fault(LOSS)
        for _ in range(10):
            assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert len(suite.first.called("StartGenerate")) == 3
        listed = {each.info.engine_name: each for each in (await listing(suite)).engines}
        assert listed["a"].breaker == admin_pb2.BREAKER_STATE_OPEN
        assert (listed["a"].healthy, listed["b"].healthy) == (False, True)
        assert "failed too often" in listed["a"].problem
        assert listed["b"].breaker == admin_pb2.BREAKER_STATE_CLOSED
        assert "breaker opened" in caplog.text
        assert [failures(each.address) for each in suite.engines] == [3, 0]
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=suite.first.address))
        await asyncio.gather(*suite.router.registry._retiring.values())
        assert failures(suite.first.address) is None


def failures(address: str) -> float | None:
    """What /metrics counts against an engine."""
    return REGISTRY.get_sample_value("microserve_router_engine_failures_total", {"address": address})


async def test_bad_requests_do_not_break_engines() -> None:
    async with running(1, breaker_failures=1) as suite:
        suite.first.faults["StartGenerate"] = Fault(BadRequest("that makes no sense"))
        for _ in range(3):
            with failing("INVALID_ARGUMENT", "BAD_REQUEST"):
                await suite.generate()
        assert (await listing(suite)).engines[0].breaker == admin_pb2.BREAKER_STATE_CLOSED


async def test_a_mended_engine_is_found_by_one_trial() -> None:
    async with running(1, breaker_failures=1, breaker_first=60, breaker_longest=60, max_retries=0) as suite:
        suite.first.faults["StartGenerate"] = Fault(LOSS, times=1)
        with failing("UNAVAILABLE", "UNAVAILABLE"):
            await suite.generate()
        with failing("UNAVAILABLE", "NO_ENGINE"):
            await suite.generate()
        breaker = suite.router.registry.members[suite.first.address].breaker
        breaker._clock = lambda: time.monotonic() + 60  # its time is over
        assert breaker.state is BreakerState.HALF_OPEN
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert breaker.state is BreakerState.CLOSED


async def listing(suite) -> admin_pb2.ListEnginesResponse:  # type: ignore[no-untyped-def]
    return await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
