"""kill -9 of each process in the middle of things. Nothing here uses a fault point except where it says so."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.router.v1 import router_pb2 as router

from tests.e2e.errors import failing, outcome
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    Engine,
    Suite,
    ask,
    generate,
    give_up,
    idle,
    prep_recv,
    remote_send,
    router_sees,
    start_suite,
    wait_for_load,
)
from tests.faults.gates import LayerGates
from tests.faults.test_cancels_and_deadlines import drain, send_request
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

PROMPT = mixed_prompts(10, 500, 300)[-1]


async def test_the_sender_dies_between_verbs(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), policy=None) as suite:
        sender, receiver = suite.engines
        prepared = await prep_recv(suite, receiver, PROMPT, 299)
        sender.process.kill()
        with failing(grpc.StatusCode.UNAVAILABLE):
            await remote_send(suite, sender, PROMPT, prepared.address)
        await give_up(receiver, prepared)
        await wait_for_load(receiver, idle)
        assert len((await generate(suite, receiver, PROMPT)).token_ids) == 16


async def test_the_receiver_dies_between_verbs(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), policy=None) as suite:
        sender, receiver = suite.engines
        prepared = await prep_recv(suite, receiver, PROMPT, 299)
        receiver.process.kill()
        receiver.process.wait(60)
        with failing(grpc.StatusCode.ABORTED, "RESERVATION_GONE"):
            await remote_send(suite, sender, PROMPT, prepared.address)
        await wait_for_load(sender, idle)
        assert len((await generate(suite, sender, PROMPT)).token_ids) == 16


@pytest.mark.parametrize("layer", [0, 2])
async def test_the_sender_dies_in_the_middle_of_a_send(tmp_path: Path, layer: int) -> None:
    """With a fault point, so that the middle is really the middle."""
    gates = LayerGates(tmp_path / "gates", 4)
    async with start_suite(make_tiny_llama(tmp_path / "m"), policy=None, options_of={0: gates.options}) as suite:
        sender, receiver = suite.engines
        prepared = await prep_recv(suite, receiver, PROMPT, 299)
        with gates.closed(layer) as gate:
            sending = sender.stub.RemoteSend(send_request(suite, prepared, ""))
            await gate.reached()
            sender.process.kill()
            assert await outcome(sending) is grpc.StatusCode.UNAVAILABLE
        replacement = await replace(suite, 0, tmp_path / "m")
        await remote_send(suite, replacement, PROMPT, prepared.address, attempt=2)
        result = await generate(suite, receiver, PROMPT, address=prepared.address)
        alone = await generate(suite, replacement, PROMPT, salt="alone")
        assert result.token_ids == alone.token_ids
        for at in (replacement, receiver):
            await wait_for_load(at, idle)


async def test_engines_die_under_traffic(tmp_path: Path) -> None:
    """No fault point: whatever the processes happen to be doing."""
    async with start_suite(make_tiny_llama(tmp_path), engine_options=["--lease-default", "2"]) as suite:
        assert suite.router is not None
        for victim in (0, 1):
            streams = []
            for number in range(12):
                request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT), cache_salt=f"{victim}{number}")
                request.sampling.max_tokens, request.sampling.ignore_eos = 100, True
                streams.append(suite.router.Generate(request, timeout=60))
            await streams[0].read()
            suite.engines[victim].process.kill()
            codes = await asyncio.gather(*(outcome(drain(stream)) for stream in streams))
            assert grpc.StatusCode.DEADLINE_EXCEEDED not in codes
            other = suite.engines[1 - victim]
            await wait_for_load(other, idle)
            assert len((await generate(suite, other, PROMPT)).token_ids) == 16
            await replace(suite, victim, tmp_path)
            await router_sees(suite, 2)
            assert len((await ask(suite, PROMPT, "disaggregated")).token_ids) == 16
            for at in suite.engines:
                await wait_for_load(at, idle)


async def test_the_transfer_service_dies(tmp_path: Path) -> None:
    async with start_suite(make_tiny_llama(tmp_path), policy=None) as suite:
        sender, receiver = suite.engines
        prepared = await prep_recv(suite, receiver, PROMPT, 299)
        address = suite.kvtransfer.address
        suite.kvtransfer.kill()
        for at in suite.engines:
            await wait_for_load(at, idle)
            assert len((await generate(suite, at, PROMPT)).token_ids) == 16
        with failing(grpc.StatusCode.UNAVAILABLE):
            await remote_send(suite, sender, PROMPT, prepared.address)
        suite.kvtransfer = suite.fleet.start_kvtransfer("kvtransfer-again", listen=address)
        suite.kvtransfer.wait_ready()
        again = await until_it_works(lambda: prep_recv(suite, receiver, PROMPT, 299, cache_salt="again"))
        await until_it_works(lambda: remote_send(suite, sender, PROMPT, again.address, cache_salt="again"))
        result = await generate(suite, receiver, PROMPT, address=again.address, salt="again")
        assert result.token_ids == (await generate(suite, sender, PROMPT, salt="alone")).token_ids
        for at in suite.engines:
            await wait_for_load(at, idle)


async def until_it_works(call, timeout_s: float = 120.0):  # type: ignore[no-untyped-def]
    """Repeats a call while it is answered UNAVAILABLE: the engine is reconnecting."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)


async def replace(suite: Suite, index: int, model: Path, options: Sequence[str] = ()) -> Engine:
    """A new engine under the name and address of one that was killed."""
    old = suite.engines[index]
    old.process.wait(60)
    process = suite.fleet.start_engine(
        old.name, model, suite.kvtransfer_of(index), listen=old.process.address, extra=["--poison-pages", *options]
    )
    suite.engines[index] = Engine(process, EngineServiceStub(suite.connect(process.address)))
    return suite.engines[index]
