"""A client that goes away, or runs out of time, at any verb: no page is lost and the engines go on."""

from __future__ import annotations

import asyncio
import itertools
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
    Engine,
    Suite,
    arrived,
    ask,
    generate,
    give_up,
    idle,
    prep_recv,
    remote_send,
    start_suite,
    wait_for_load,
)
from tests.e2e.waiting import until
from tests.faults.gates import LayerGates
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

PROMPT = mixed_prompts(10, 500, 300)[-1]
LAYER_COUNT = 4


async def everything_back(suite: Suite) -> None:
    """Both engines hold nothing and still answer."""
    for at in suite.engines:
        await wait_for_load(at, idle)
        assert len((await generate(suite, at, PROMPT[:20])).token_ids) == 16
    assert len((await ask(suite, PROMPT[:40], "disaggregated")).token_ids) == 16


async def test_cancel_at_every_verb(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", layers=LAYER_COUNT)
    gates = LayerGates(tmp_path / "gates", LAYER_COUNT)
    # A prompt is sent in several pieces, and a cancel is heard between two of them.
    options = {0: [*gates.options, "--max-step-tokens", "128"], 1: ["--lease-default", "2"]}
    async with start_suite(model, options_of=options) as suite:
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

        for layer in range(LAYER_COUNT):
            prepared = await prep_recv(suite, receiver, PROMPT, 299, cache_salt=f"send {layer}")
            with gates.closed(layer) as gate:
                sending = sender.stub.RemoteSend(send_request(suite, prepared, f"send {layer}"))
                await gate.reached()
                sending.cancel()
                assert await outcome(sending) is grpc.StatusCode.CANCELLED
                await arrived(sender)
            await wait_for_load(sender, idle)
            # The attempt is over, and what it brought is not the whole.
            await until(lambda: states(receiver), [engine.RESERVATION_STATE_RESERVED])
            await give_up(receiver, prepared)
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
            if waiting:
                # The reservation is there still, for another sequence.
                await wait_for_load(receiver, lambda report: report.waiting_for_kv_count == 0)
                await give_up(receiver, prepared)
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
    model = make_tiny_llama(tmp_path / "model", layers=LAYER_COUNT)
    gates = LayerGates(tmp_path / "gates", LAYER_COUNT)
    async with start_suite(model, options_of={0: gates.options}) as suite:
        sender, receiver = suite.engines
        prepared, attempts = await prep_recv(suite, receiver, PROMPT, 299), itertools.count(1)
        with gates.closed(0) as gate:
            sending = await gate.with_deadline(
                lambda timeout_s: outcome(
                    sender.stub.RemoteSend(send_request(suite, prepared, "", next(attempts)), timeout=timeout_s)
                )
            )
            assert await sending is grpc.StatusCode.DEADLINE_EXCEEDED
            # The sender stands at its first layer still: what this waits for cannot come.
            start = engine.StartGenerateRequest(
                owner_id=OWNER,
                request_id="late",
                prompt_token_ids=PROMPT,
                begin=299,
                reservation=reference(prepared),
            )
            start.timeout.FromMilliseconds(300)
            with failing(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"):
                await receiver.stub.StartGenerate(start).read()
        await wait_for_load(sender, idle)
        await give_up(receiver, prepared)
        await wait_for_load(receiver, idle)


async def test_the_router_is_killed(tmp_path: Path) -> None:
    """In the middle of answers that take a minute."""
    model = make_tiny_llama(tmp_path, max_context=16_384)
    async with start_suite(model, engine_options=["--lease-default", "2"]) as suite:
        assert suite.router is not None
        assert suite.router_process is not None
        streams = []
        for policy in ("data_parallel", "disaggregated", "balanced:0.5", "context_aware") * 3:
            request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT), cache_salt=f"{len(streams)}")
            request.sampling.max_tokens, request.sampling.ignore_eos = 16_000, True
            streams.append(suite.router.Generate(request, metadata=(("x-microserve-policy", policy),)))
        await streams[0].read()
        suite.router_process.kill()
        codes = await asyncio.gather(*(outcome(drain(stream)) for stream in streams))
        assert grpc.StatusCode.UNAVAILABLE in codes
        for at in suite.engines:
            await wait_for_load(at, idle)
            assert len((await generate(suite, at, PROMPT[:20])).token_ids) == 16


async def states(at: Engine) -> list[engine.ReservationState.ValueType]:
    """Of all reservations there, the oldest first."""
    listed = await at.stub.ListReservations(engine.ListReservationsRequest(), timeout=60)
    return [info.state for info in listed.reservations]


async def drain(stream: grpc.aio.UnaryStreamCall) -> None:  # type: ignore[type-arg]
    while await stream.read() is not grpc.aio.EOF:
        pass


def reference(prepared: engine.PrepRecvResponse) -> engine.ReservationRef:
    return engine.ReservationRef(reservation_id=prepared.address.reservation_id, secret=prepared.address.secret)


def send_request(
    suite: Suite, prepared: engine.PrepRecvResponse, salt: str, attempt: int = 1
) -> engine.RemoteSendRequest:
    return engine.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=PROMPT,
        range=prepared.address.window,
        address=prepared.address,
        cache_salt=salt,
        attempt=attempt,
    )
