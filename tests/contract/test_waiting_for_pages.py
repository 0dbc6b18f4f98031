"""PrepRecv that waits for pages, and Abort."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2 as kv

from tests.contract.verbs import (
    prompt_of,
    release,
    reservations,
)
from tests.e2e.errors import failing
from tests.e2e.suite import (
    OWNER,
    Engine,
    Suite,
    generate,
    idle,
    prep_recv,
    remote_send,
    wait_for_load,
)
from tests.faults.gates import StepGate

pytestmark = pytest.mark.slow


async def full(suite: Suite, at: Engine, seed: int) -> list[kv.KvAddress]:
    """Two reservations of the small engine, which leave no room for another."""
    await wait_for_load(at, idle)
    return [(await prep_recv(suite, at, prompt_of(120, seed + i), 120)).address for i in range(2)]


def waiting_request(suite: Suite, seed: int, wait_ms: int) -> pb.PrepRecvRequest:
    request = pb.PrepRecvRequest(
        owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=prompt_of(100, seed), end=100
    )
    request.max_wait.FromMilliseconds(wait_ms)
    return request


async def test_prep_recv_waits_for_pages(suite: Suite) -> None:
    at = suite.engines[2]
    held = await full(suite, at, 300)
    # They are served in order of arrival.
    calls = [asyncio.ensure_future(prep_recv_of(at, waiting_request(suite, 310 + i, 30_000))) for i in range(2)]
    for _ in range(20):
        assert len(await reservations(at)) == 2
    assert not any(call.done() for call in calls)
    await release(at, held[0])
    served = await asyncio.wait_for(asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED), 60)
    (first,) = served[0]
    assert len(first.result().address.shards[0].page_ids) == 7
    await release(at, held[1])
    answers = await asyncio.wait_for(asyncio.gather(*calls), 60)
    assert {info.reservation_id for info in await reservations(at)} == {a.address.reservation_id for a in answers}
    for answer in answers:
        await release(at, answer.address)
    await wait_for_load(at, idle)


async def abort(at: Engine, request_id: str) -> None:
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id=request_id), timeout=60)


async def prep_recv_of(at: Engine, request: pb.PrepRecvRequest) -> pb.PrepRecvResponse:
    return await at.stub.PrepRecv(request, timeout=60)


async def test_prep_recv_is_refused_when_no_pages_come(suite: Suite) -> None:
    at = suite.engines[2]
    held = await full(suite, at, 320)
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_PAGES") as at_once:
        await prep_recv(suite, at, prompt_of(100, 330), 100)
    assert at_once.retry_delay_s is not None
    began = time.monotonic()
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "NO_PAGES") as later:
        await at.stub.PrepRecv(waiting_request(suite, 330, 300), timeout=30)
    assert 0.29 <= time.monotonic() - began < 10
    assert later.retry_delay_s is not None
    assert later.retry_delay_s > 0
    # A longest prompt still runs: reservations never take its pages.
    assert len((await generate(suite, at, prompt_of(118, 331), max_tokens=10)).token_ids) == 10
    # A waiter that is aborted leaves the queue.
    request = waiting_request(suite, 332, 30_000)
    waiting = asyncio.ensure_future(prep_recv_of(at, request))
    for _ in range(20):  # round trips on the same connection: it has arrived
        assert len(await reservations(at)) == 2
    assert not waiting.done()
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id=request.request_id))
    with failing(grpc.StatusCode.CANCELLED):
        await waiting
    for address in held:
        await release(at, address)
    await wait_for_load(at, idle)


# --- abort ------------------------------------------------------------------------------------------------------


async def test_abort_ends_reservations_and_generations(suite: Suite, gates: tuple[StepGate, StepGate]) -> None:
    at, prompt = suite.engines[1], prompt_of(50, 400)
    request = pb.PrepRecvRequest(owner_id=OWNER, request_id="aborted", prompt_token_ids=prompt, end=50)
    prepared = await at.stub.PrepRecv(request)
    await at.stub.Abort(pb.AbortRequest(owner_id="other", request_id="aborted"))
    assert len(await reservations(at)) == 1, "another owner's request is another request"
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="aborted"))
    assert await reservations(at) == []
    with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
        await remote_send(suite, suite.engines[0], prompt, prepared.address)
    start = pb.StartGenerateRequest(owner_id=OWNER, request_id="running", prompt_token_ids=prompt)
    start.sampling.max_tokens, start.sampling.ignore_eos = 1900, True
    with gates[1].closed() as gate:
        call = at.stub.StartGenerate(start, timeout=60)
        assert (await gate.until(call.read())).token_ids
        aborting = asyncio.ensure_future(abort(at, "running"))
        await at.stub.GetInfo(pb.GetInfoRequest())  # a round trip on the same connection: it has arrived
    await aborting
    last = None
    while isinstance(message := await call.read(), pb.StartGenerateResponse):
        last = message
    assert last is not None
    assert last.finish_reason == 3, "FINISH_REASON_CANCELLED"
    await at.stub.Abort(pb.AbortRequest(owner_id=OWNER, request_id="running"))
    await wait_for_load(at, idle)
