"""Verbs that fail, hang or are cut off: the client gets the engine's error, and nothing stays behind."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from microserve.router.v1 import router_pb2

from services.protocol.errors import ServiceError
from services.router.metrics import CLEANUP_FAILURES
from tests.fake_kv import FakeKv
from tests.fakes import FakeBug, FakeEngine, FakeError, Fault
from tests.router.harness import PROMPT, failing, model, request, running

# Where a request is when it is cut off: (index of the engine, method, after it took effect, after so many tokens).
PLACES = {
    "prep_recv": (1, "PrepRecv", False, 0),
    "prep_recv_reserved": (1, "PrepRecv", True, 0),
    "remote_send": (0, "RemoteSend", False, 0),
    "remote_send_committed": (0, "RemoteSend", True, 0),
    "start_generate": (1, "StartGenerate", False, 0),
    "start_generate_streaming": (1, "StartGenerate", False, 3),
}


def break_at(engines: list[FakeEngine], place: str, error: ServiceError | None = None) -> Fault:
    """Makes one verb fail, or hang without an error."""
    index, method, late, after_tokens = PLACES[place]
    fault = engines[index].faults[method] = Fault(error, late, after_tokens)
    return fault


@pytest.mark.parametrize("place", PLACES)
async def test_a_client_that_goes_away_leaves_nothing_behind(place: str) -> None:
    async with running(policy="disaggregated") as suite:
        fault = break_at(suite.engines, place)
        call = suite.stream()
        await fault.reached.wait()
        call.cancel()
        assert await call.code() == grpc.StatusCode.CANCELLED
        await suite.idle()
        for engine in suite.engines:
            engine.faults.clear()
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)


@pytest.mark.parametrize("place", PLACES)
async def test_the_engines_error_reaches_the_client(place: str) -> None:
    async with running(policy="disaggregated") as suite:
        break_at(suite.engines, place, FakeBug("it is broken here", retry_delay_s=2.0))
        with failing("INTERNAL", "INTERNAL") as caught:
            await suite.generate()
        assert caught.value.retry_delay_s == 2.0
        await suite.idle()


@pytest.mark.parametrize("place", PLACES)
async def test_a_deadline_cuts_off_what_hangs(place: str) -> None:
    async with running(policy="disaggregated") as suite:
        break_at(suite.engines, place)
        call = suite.stub.Generate(request(), timeout=0.2)
        assert await call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await suite.idle()


async def test_the_routers_own_limit_cuts_off_a_request_without_deadline() -> None:
    async with running(policy="disaggregated", request_timeout=0.2) as suite:
        break_at(suite.engines, "start_generate_streaming")
        with failing("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"):
            await suite.generate()


async def test_deadlines_are_passed_on() -> None:
    async with running(policy="disaggregated") as suite:
        await suite.stub.Complete(router_pb2.CompleteRequest(request=request()), timeout=60)
        [start] = suite.engines[1].called("Session")
        assert 30 < start.timeout.ToNanoseconds() / 1e9 < 60.5


async def test_an_engine_that_restarts_is_picked_up_again() -> None:
    async with running(1) as suite:
        await suite.generate()
        old = suite.first
        await suite.cached(old, 12)
        await old.stop()
        await suite.until(lambda: not suite.router.serving)
        with failing("UNAVAILABLE", "NO_ENGINE"):
            await suite.generate()
        new = FakeEngine(model(), "a")
        await new.start(old.address)
        await suite.until(lambda: suite.router.serving)
        assert len(suite.router.registry.members[new.address].blocks) == 0
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        suite.engines[:] = [new]
        await suite.idle()
        await new.stop()


@pytest.mark.slow
async def test_a_long_send_renews_its_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In time: test_lease.py."""
    monkeypatch.setattr(FakeKv, "expire", lambda *_: None)
    peers: dict[str, FakeEngine] = {}
    engines = [FakeEngine(model(), name, peers=peers, lease_s=0.3) for name in "ab"]
    async with running(engines=engines, policy="disaggregated") as suite:
        fault = break_at(engines, "remote_send")
        asking = asyncio.create_task(suite.generate())
        await fault.reached.wait()
        [reservation] = engines[1].kv.live
        await engines[1].until(lambda: reservation.num_renewals >= 4)
        asking.cancel()
        await suite.idle()


async def test_a_release_that_fails_is_counted_and_left_to_the_lease() -> None:
    counter = CLEANUP_FAILURES.labels("release", "NO_PAGES")
    before = counter._value.get()
    async with running(policy="disaggregated") as suite:
        suite.engines[1].faults["Release"] = Fault(FakeError("no releases today"))
        break_at(suite.engines, "remote_send", FakeBug("no sending today"))
        with failing("INTERNAL", "INTERNAL"):
            await suite.generate()
        kv = suite.engines[1].kv
        [left] = kv.live
        kv.expire(left)
    assert counter._value.get() == before + 1
