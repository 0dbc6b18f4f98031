"""Retries change nothing, mismatches are refused, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as engine
from microserve.types.v1 import kv_pb2 as kv

from tests.e2e.errors import failing
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    OWNER,
    Engine,
    EngineServiceStub,
    Suite,
    generate,
    idle,
    load,
    pool_of,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PROMPT = mixed_prompts(10, 500, 120)[-1]
CODES = grpc.StatusCode


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> StepGate:
    """Of the first engine."""
    return StepGate(tmp_path_factory.mktemp("gates") / "step")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory, steps: StepGate) -> AsyncIterator[Suite]:
    folder: Path = tmp_path_factory.mktemp("models")
    async with start_suite(make_tiny_llama(folder / "one"), policy=None, options_of={0: steps.options}) as running:
        other = make_tiny_llama(folder / "two", seed=1)
        process = running.fleet.start_engine("other-model", other, running.kvtransfer)
        running.engines.append(Engine(process, EngineServiceStub(running.connect(process.address))))
        yield running


async def test_prep_recv_again_is_the_same_reservation(suite: Suite) -> None:
    at = suite.engines[1]
    request = engine.PrepRecvRequest(owner_id=OWNER, request_id="again", prompt_token_ids=PROMPT, end=100)
    first = await at.stub.PrepRecv(request)
    held = (await wait_for_load(at, lambda report: report.reservation_count == 1)).pages.held
    second = await at.stub.PrepRecv(request)
    assert second.address == first.address
    assert (await load(at.stub)).pages.held == held
    with failing(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED"):
        await at.stub.PrepRecv(
            engine.PrepRecvRequest(owner_id=OWNER, request_id="again", prompt_token_ids=PROMPT, end=99)
        )
    await at.stub.Abort(engine.AbortRequest(owner_id=OWNER, request_id="again"))
    await at.stub.Abort(engine.AbortRequest(owner_id=OWNER, request_id="again"))
    await wait_for_load(at, idle)


async def test_remote_send_again_joins_or_reports_the_commit(suite: Suite) -> None:
    sender, receiver = suite.engines[:2]
    prepared = await prep_recv(suite, receiver, PROMPT, len(PROMPT), cache_salt="send again")
    request = engine.RemoteSendRequest(
        owner_id=OWNER,
        request_id="send again",
        prompt_token_ids=PROMPT,
        range=prepared.address.window,
        address=prepared.address,
        cache_salt="send again",
    )
    moved = await suite.transferred_bytes()
    together = await asyncio.gather(*(sender.stub.RemoteSend(request) for _ in range(3)))
    later = await sender.stub.RemoteSend(request)
    assert {answer.timing.transferred_bytes for answer in [*together, later]} == {later.timing.transferred_bytes}
    assert await suite.transferred_bytes() - moved == later.timing.transferred_bytes > 0
    request.range.end -= 1
    with failing(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED"):
        await sender.stub.RemoteSend(request)
    result = await generate(suite, receiver, PROMPT, address=prepared.address, salt="send again")
    assert result.timing.computed_token_count == 1, "only the last prompt token is computed again"
    await wait_for_load(receiver, idle)


async def test_a_second_start_of_a_live_sequence_is_refused(suite: Suite, steps: StepGate) -> None:
    at = suite.engines[0]
    request = engine.StartGenerateRequest(owner_id=OWNER, request_id="live", prompt_token_ids=PROMPT)
    request.sampling.max_tokens, request.sampling.ignore_eos = 400, True
    with steps.closed() as gate:
        first = at.stub.StartGenerate(request)
        assert (await gate.until(first.read())).token_ids
        with failing(grpc.StatusCode.ALREADY_EXISTS):
            await at.stub.StartGenerate(request).read()
    first.cancel()
    await wait_for_load(at, idle)


async def test_another_prompt_or_model_is_refused(suite: Suite) -> None:
    sender, receiver, other = suite.engines
    prepared = await prep_recv(suite, receiver, PROMPT, 64, cache_salt="mismatch")
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_MISMATCH"):
        await remote_send(suite, sender, [*PROMPT[:10], 7, *PROMPT[11:]], prepared.address, cache_salt="mismatch")
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_MISMATCH"):
        await remote_send(suite, sender, PROMPT, prepared.address, cache_salt="another tenant")
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH"):
        await remote_send(suite, other, PROMPT, prepared.address, cache_salt="mismatch")
    await remote_send(suite, sender, PROMPT, prepared.address, cache_salt="mismatch")
    with failing(grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_MISMATCH"):
        await generate(suite, receiver, [9, *PROMPT[1:]], address=prepared.address, salt="mismatch")
    await generate(suite, receiver, PROMPT, address=prepared.address, salt="mismatch")
    for at in suite.engines:
        await wait_for_load(at, idle)


FORGERIES: dict[str, tuple[Callable[[kv.KvAddress], object], grpc.StatusCode, str]] = {
    "secret": (lambda a: setattr(a, "secret", bytes(16)), CODES.PERMISSION_DENIED, "WRONG_SECRET"),
    "epoch": (lambda a: setattr(a, "epoch", bytes(16)), CODES.FAILED_PRECONDITION, "STALE_EPOCH"),
    "reservation": (lambda a: setattr(a, "reservation_id", "nobody"), CODES.ABORTED, "RESERVATION_GONE"),
    "pool": (lambda a: setattr(a.shards[0], "pool_id", "0-1"), CODES.FAILED_PRECONDITION, "STALE_EPOCH"),
    "page": (lambda a: a.shards[0].page_ids.__setitem__(0, 0), CODES.INVALID_ARGUMENT, "INVALID_PAGES"),
    "page beyond the pool": (
        lambda a: a.shards[0].page_ids.__setitem__(0, 2**31),
        CODES.INVALID_ARGUMENT,
        "INVALID_PAGES",
    ),
    "too few pages": (lambda a: a.shards[0].page_ids.pop(), CODES.INVALID_ARGUMENT, "BAD_REQUEST"),
    "too many pages": (lambda a: a.shards[0].page_ids.append(0), CODES.INVALID_ARGUMENT, "BAD_REQUEST"),
    "half the layers": (lambda a: setattr(a.shards[0], "layer_end", 2), CODES.FAILED_PRECONDITION, "LAYOUT_MISMATCH"),
    "page size": (lambda a: setattr(a.layout, "page_size", 32), CODES.INVALID_ARGUMENT, "BAD_REQUEST"),
    "window": (lambda a: setattr(a.window, "end", 80), CODES.INVALID_ARGUMENT, "BAD_REQUEST"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_address_writes_nothing(suite: Suite, forgery: str) -> None:
    """Whatever a sender is told that is not so, the receiver's pages stay as they were, and the right address works."""
    sender, receiver = suite.engines[:2]
    forge, code, reason = FORGERIES[forgery]
    prepared = await prep_recv(suite, receiver, PROMPT, 64, cache_salt=forgery)
    before = await pool_of(suite, receiver)
    forged = kv.KvAddress()
    forged.CopyFrom(prepared.address)
    forge(forged)
    with failing(code, reason):
        await remote_send(suite, sender, PROMPT, forged, cache_salt=forgery)
    assert (await pool_of(suite, receiver)).tobytes() == before.tobytes()
    await remote_send(suite, sender, PROMPT, prepared.address, attempt=2, cache_salt=forgery)
    result = await generate(suite, receiver, PROMPT, address=prepared.address, salt=forgery)
    assert result.timing.transferred_token_count == 64
    for at in (sender, receiver):
        await wait_for_load(at, idle)


async def test_an_attempt_from_before_moves_nothing(suite: Suite) -> None:
    """Numbers go up: who comes with a lower one than was used is late."""
    sender, receiver = suite.engines[:2]
    prepared = await prep_recv(suite, receiver, PROMPT, 64, cache_salt="attempts")
    await remote_send(suite, sender, PROMPT, prepared.address, attempt=3, cache_salt="attempts")
    moved = await suite.transferred_bytes()
    await remote_send(suite, sender, PROMPT, prepared.address, attempt=2, cache_salt="attempts")
    assert await suite.transferred_bytes() == moved
    result = await generate(suite, receiver, PROMPT, address=prepared.address, salt="attempts")
    assert result.timing.transferred_token_count == 64
    for at in (sender, receiver):
        await wait_for_load(at, idle)


async def test_wrong_secrets_and_what_is_over(suite: Suite) -> None:
    sender, receiver = suite.engines[:2]
    prepared = await prep_recv(suite, receiver, PROMPT, 64, cache_salt="forged")
    wrong = engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=bytes(16))
    with failing(grpc.StatusCode.PERMISSION_DENIED, "WRONG_SECRET"):
        await receiver.stub.Release(engine.ReleaseRequest(reservation=wrong))
    with failing(grpc.StatusCode.PERMISSION_DENIED, "WRONG_SECRET"):
        await receiver.stub.Renew(engine.RenewRequest(reservation=wrong))
    unknown = engine.ReservationRef(reservation_id="nobody", secret=bytes(16))
    with failing(grpc.StatusCode.NOT_FOUND, "UNKNOWN_RESERVATION"):
        await receiver.stub.Renew(engine.RenewRequest(reservation=unknown))
    right = engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)
    await receiver.stub.Release(engine.ReleaseRequest(reservation=right))
    await receiver.stub.Release(engine.ReleaseRequest(reservation=right))
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await remote_send(suite, sender, PROMPT, prepared.address, cache_salt="forged")
    for at in suite.engines:
        await wait_for_load(at, idle)


async def test_a_lease_runs_out(suite: Suite) -> None:
    receiver = suite.engines[1]
    request = engine.PrepRecvRequest(owner_id=OWNER, request_id="short", prompt_token_ids=PROMPT, end=100)
    request.lease.FromSeconds(3)
    prepared = await receiver.stub.PrepRecv(request)
    assert 2000 < prepared.lease.ToMilliseconds() <= 3000
    await wait_for_load(receiver, idle)
    ref = engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await receiver.stub.Renew(engine.RenewRequest(reservation=ref))
