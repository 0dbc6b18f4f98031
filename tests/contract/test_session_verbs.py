"""All three verbs on sessions with real engines: the same tokens, refusals and pages as by calls of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2 as kv
from microserve.types.v1 import sampling_pb2

from services.rpc.status import from_rpc_error
from tests.contract.verbs import prompt_of, release, reservations
from tests.e2e.suite import OWNER, Engine, Suite, generate, idle, prep_recv, remote_send, wait_for_load

pytestmark = pytest.mark.slow


class Conversation:
    """One session, one command at a time."""

    def __init__(self, call: grpc.aio.StreamStreamCall) -> None:
        self._call = call

    async def ask(self, **command: object) -> pb.VerbAnswer:
        await self._call.write(pb.SessionRequest(**command))
        (answer,) = (await asyncio.wait_for(self._call.read(), 120)).answers
        return answer

    async def generate(self, request: pb.StartGenerateRequest) -> list[int]:
        await self._call.write(pb.SessionRequest(start=request))
        tokens: list[int] = []
        while True:
            (output,) = (await asyncio.wait_for(self._call.read(), 120)).outputs
            assert not output.HasField("error"), output.error
            tokens += output.output.token_ids
            if output.output.finish_reason:
                return tokens


@asynccontextmanager
async def session(at: Engine) -> AsyncIterator[Conversation]:
    call = at.stub.Session(timeout=240)
    try:
        yield Conversation(call)
    finally:
        call.cancel()


def prep(suite: Suite, prompt: Sequence[int], end: int, **fields: object) -> pb.PrepRecvRequest:
    return pb.PrepRecvRequest(owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=prompt, end=end, **fields)


def send(suite: Suite, prompt: Sequence[int], address: kv.KvAddress, **fields: object) -> pb.RemoteSendRequest:
    values = {"owner_id": OWNER, "request_id": suite.new_id(), "prompt_token_ids": prompt, "range": address.window}
    return pb.RemoteSendRequest(**{**values, "address": address, **fields})


async def test_a_prompt_moved_over_sessions_gives_the_tokens_of_calls(suite: Suite) -> None:
    sender, receiver = suite.engines[:2]
    prompt, end = prompt_of(90, 700), 70
    expected = (await generate(suite, sender, prompt, max_tokens=8, salt="alone")).token_ids
    by_calls = await prep_recv(suite, receiver, prompt, end, cache_salt="calls")
    sent_by_calls = await remote_send(suite, sender, prompt, by_calls.address, cache_salt="calls")
    async with session(receiver) as there, session(sender) as here:
        prepared = (await there.ask(prep_recv=prep(suite, prompt, end, cache_salt="session"))).prep_recv
        sent = (await here.ask(remote_send=send(suite, prompt, prepared.address, cache_salt="session"))).remote_send
        assert sent.timing.transferred_bytes == sent_by_calls.timing.transferred_bytes > 0
        start = pb.StartGenerateRequest(
            owner_id=OWNER,
            request_id=suite.new_id(),
            prompt_token_ids=prompt,
            begin=end,
            cache_salt="session",
            sampling=sampling_pb2.SamplingParams(max_tokens=8, ignore_eos=True),
            reservation=pb.ReservationRef(
                reservation_id=prepared.address.reservation_id, secret=prepared.address.secret
            ),
        )
        assert await there.generate(start) == expected
    await release(receiver, by_calls.address)
    await wait_for_load(receiver, idle)


async def test_refusals_are_those_of_calls(suite: Suite) -> None:
    sender, receiver = suite.engines[:2]
    prompt = prompt_of(60, 710)
    address = (await prep_recv(suite, receiver, prompt, 60)).address
    stale = kv.KvAddress()
    stale.CopyFrom(address)
    stale.prompt_digest = bytes(16)
    bad = [
        prep(suite, [], 0),
        prep(suite, prompt, 61),
        prep(suite, [1 << 20], 1),
        prep(suite, prompt_of(5000, 711), 10),
        send(suite, prompt, stale),
        send(suite, prompt_of(60, 712), address),
        send(suite, prompt, address, range=kv.TokenRange(begin=50, end=61)),
    ]
    async with session(sender) as here:
        for request in bad:
            is_prep = isinstance(request, pb.PrepRecvRequest)
            answer = await here.ask(**{"prep_recv" if is_prep else "remote_send": request})
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (sender.stub.PrepRecv if is_prep else sender.stub.RemoteSend)(request, timeout=60)
            alone = from_rpc_error(caught.value)
            assert (answer.error.code, answer.error.reason) == (alone.code, alone.reason)
    await release(receiver, address)


async def test_a_retry_finds_what_the_call_before_it_got(suite: Suite) -> None:
    at = suite.engines[1]
    request = prep(suite, prompt_of(50, 720), 50)
    async with session(at) as here:
        first = (await here.ask(prep_recv=request)).prep_recv
        assert (await here.ask(prep_recv=request)).prep_recv.address == first.address
        assert (await at.stub.PrepRecv(request, timeout=60)).address == first.address
        request.end = 40
        assert (await here.ask(prep_recv=request)).error.reason == "REQUEST_ID_REUSED"
    assert len(await reservations(at)) == 1, "what was answered outlives its session"
    await release(at, first.address)


@pytest.mark.parametrize("way", ["cancel", "stream", "timeout"])
async def test_a_prep_recv_that_waits_for_pages_ends_and_holds_nothing(suite: Suite, way: str) -> None:
    at = suite.engines[2]
    await wait_for_load(at, idle)
    held = [(await prep_recv(suite, at, prompt_of(120, 730 + i), 120)).address for i in range(2)]
    waiting = prep(suite, prompt_of(100, 740), 100)
    waiting.max_wait.FromSeconds(600)
    if way == "timeout":
        waiting.timeout.FromMilliseconds(1)
    call = at.stub.Session(timeout=240)
    await call.write(pb.SessionRequest(prep_recv=waiting))
    if way == "cancel":
        await call.write(pb.SessionRequest(cancel=pb.CancelCall(request_id=waiting.request_id)))
    if way != "stream":
        (answer,) = (await asyncio.wait_for(call.read(), 120)).answers
        expected = {"cancel": "REQUEST_CANCELLED", "timeout": "DEADLINE_EXCEEDED"}[way]
        assert (answer.request_id, answer.error.reason) == (waiting.request_id, expected)
    call.cancel()
    for address in held:
        await release(at, address)
    # Were it still waiting, it would now have its pages.
    await wait_for_load(at, idle)
    assert await reservations(at) == []


async def test_a_send_keeps_its_time(suite: Suite) -> None:
    sender, receiver = suite.engines[:2]
    prompt = prompt_of(1500, 750)
    address = (await prep_recv(suite, receiver, prompt, 1500)).address
    request = send(suite, prompt, address)
    request.timeout.FromNanoseconds(1000)
    async with session(sender) as here:
        assert (await here.ask(remote_send=request)).error.reason == "DEADLINE_EXCEEDED"
    await release(receiver, address)
    await wait_for_load(sender, idle)
    await wait_for_load(receiver, idle)
