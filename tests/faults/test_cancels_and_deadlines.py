"""A client that goes away, or runs out of time, at any verb: no page is lost and the engines go on."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as engine
from microserve.router.v1 import router_pb2 as router

from tests.e2e.errors import failing, outcome
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    OWNER,
    Suite,
    ask,
    generate,
    idle,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

PROMPT = mixed_prompts(10, 500, 300)[-1]


async def everything_back(suite: Suite) -> None:
    """Both engines hold nothing and still answer."""
    for at in suite.engines:
        await wait_for_load(at, idle)
        assert len((await generate(suite, at, PROMPT[:20])).token_ids) == 16
    assert len((await ask(suite, PROMPT[:40], "disaggregated")).token_ids) == 16


async def test_cancel_at_every_verb(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), options_of={1: ["--lease-default", "2"]}) as suite:
        sender, receiver = suite.engines
        for _ in range(5):
            request = engine.PrepRecvRequest(
                owner_id=OWNER, request_id=suite.new_id(), prompt_token_ids=PROMPT, end=200, cache_salt="c"
            )
            call = receiver.stub.PrepRecv(request)
            await call.wait_for_connection()
            call.cancel()
            assert await outcome(call) in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
        await wait_for_load(receiver, idle)

        for turn in range(5):
            prepared = await prep_recv(suite, receiver, PROMPT, 299, cache_salt=f"send {turn}")
            sending = sender.stub.RemoteSend(send_request(suite, prepared, f"send {turn}"))
            await wait_for_load(sender, lambda report, sending=sending: report.pages.held > 0 or sending.done())
            sending.cancel()
            await outcome(sending)
            await wait_for_load(sender, idle)
            await receiver.stub.Release(engine.ReleaseRequest(reservation=reference(prepared)))
            await wait_for_load(receiver, idle)

        for waiting in (False, True):
            prepared = await prep_recv(suite, receiver, PROMPT, 299, cache_salt=f"start {waiting}")
            if not waiting:
                await remote_send(suite, sender, PROMPT, prepared.address, cache_salt=f"start {waiting}")
            start = engine.StartGenerateRequest(
                owner_id=OWNER,
                request_id=suite.new_id(),
                prompt_token_ids=PROMPT,
                begin=299,
                cache_salt=f"start {waiting}",
                reservation=reference(prepared),
            )
            start.sampling.ignore_eos = True
            stream = receiver.stub.StartGenerate(start)
            if waiting:
                await wait_for_load(receiver, lambda report: report.waiting_for_kv_count == 1)
            else:
                await stream.read()
            stream.cancel()
            await wait_for_load(receiver, idle)
        await everything_back(suite)


async def test_cancel_through_the_router(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path)) as suite:
        assert suite.router is not None
        for tokens_to_read in (0, 1, 3):
            for policy in ("data_parallel", "disaggregated", "balanced:0.5"):
                request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT))
                request.sampling.max_tokens, request.sampling.ignore_eos = 300, True
                stream = suite.router.Generate(request, metadata=(("x-microserve-policy", policy),))
                for _ in range(tokens_to_read):
                    await stream.read()
                stream.cancel()
        await everything_back(suite)


async def test_deadlines_pass(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    hold = ["--fault-points", f"send.layer.0=hold:{fifo}"]
    short = ["--lease-default", "3"]
    async with start_suite(make_tiny_llama(tmp_path / "m"), options_of={0: hold, 1: short}) as suite:
        sender, receiver = suite.engines
        prepared = await prep_recv(suite, receiver, PROMPT, 299)
        with failing(grpc.StatusCode.DEADLINE_EXCEEDED):
            await sender.stub.RemoteSend(send_request(suite, prepared, ""), timeout=0.5)
        await let_go(fifo)
        await wait_for_load(sender, idle)
        start = engine.StartGenerateRequest(
            owner_id=OWNER, request_id="late", prompt_token_ids=PROMPT, begin=299, reservation=reference(prepared)
        )
        start.timeout.FromMilliseconds(300)
        with failing(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"):
            await receiver.stub.StartGenerate(start).read()
        await wait_for_load(receiver, lambda report: report.pages.held == report.pages.quarantined == 0)


async def test_the_router_is_killed(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), engine_options=["--lease-default", "2"]) as suite:
        assert suite.router is not None
        assert suite.router_process is not None
        streams = []
        for policy in ("data_parallel", "disaggregated", "balanced:0.5", "context_aware") * 3:
            request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT), cache_salt=f"{len(streams)}")
            request.sampling.max_tokens, request.sampling.ignore_eos = 300, True
            streams.append(suite.router.Generate(request, metadata=(("x-microserve-policy", policy),)))
        await streams[0].read()
        suite.router_process.kill()
        codes = await asyncio.gather(*(outcome(drain(stream)) for stream in streams))
        assert grpc.StatusCode.UNAVAILABLE in codes
        for at in suite.engines:
            await wait_for_load(at, idle)
            assert len((await generate(suite, at, PROMPT[:20])).token_ids) == 16


async def drain(stream: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
    while await stream.read() is not grpc.aio.EOF:
        pass


async def let_go(fifo: Path) -> None:
    """Lets an engine that is held at a fault point go on."""
    descriptor = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)
    os.write(descriptor, b"go")
    os.close(descriptor)


def reference(prepared: engine.PrepRecvResponse) -> engine.ReservationRef:
    return engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)


def send_request(suite: Suite, prepared: engine.PrepRecvResponse, salt: str) -> engine.RemoteSendRequest:
    return engine.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=PROMPT,
        range=prepared.address.window,
        address=prepared.address,
        cache_salt=salt,
    )
