"""An engine that restarts while its transfer service lives, the reverse, and both at once: what survives."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub

from services.cli.process import ServiceProcess
from tests.e2e.errors import failing
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Engine, Suite, generate, idle, prep_recv, remote_send, start_suite, wait_for_load
from tests.faults.gates import StepGate
from tests.faults.test_kills import until_it_works
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

PROMPT, OTHER = mixed_prompts(12, 500, 300)[9:11]
END = len(PROMPT) - 1
CODES = grpc.StatusCode

# Engine 0, which sends, belongs to the first transfer service; engine 1 to the second, if there are two.
each_transport = pytest.mark.parametrize("num_kvtransfers", [1, 2], ids=["shm", "tcp"])


def end(process: ServiceProcess) -> None:
    process.kill()
    process.wait(60)


def use_engine(suite: Suite, index: int, process: ServiceProcess) -> None:
    """Waits until it is ready."""
    suite.engines[index] = Engine(process, EngineServiceStub(suite.connect(process.address)))


def restart_service(suite: Suite, index: int) -> None:
    process = suite.fleet.start_again(suite.kvtransfers[index])
    process.wait_ready()
    suite.replace_kvtransfer(index, process)


async def check_transfer(suite: Suite, salt: str) -> None:
    """Engine 0 sends to engine 1, which generates what engine 0 would."""
    sender, receiver = suite.engines
    prepared = await until_it_works(lambda: prep_recv(suite, receiver, PROMPT, END, cache_salt=salt))
    await until_it_works(lambda: remote_send(suite, sender, PROMPT, prepared.address, cache_salt=salt))
    result = await generate(suite, receiver, PROMPT, address=prepared.address, salt=salt)
    alone = await generate(suite, sender, PROMPT, salt=f"{salt} alone")
    assert result.token_ids == alone.token_ids
    assert result.timing.computed_token_count == 1
    for at in suite.engines:
        await wait_for_load(at, idle)


@each_transport
async def test_the_service_restarts_and_what_was_whole_survives(tmp_path: Path, num_kvtransfers: int) -> None:
    """Filled reservations, streams and prefix caches go on; what was not filled is gone, and its caller is told."""
    model, steps = make_tiny_llama(tmp_path / "model"), StepGate(tmp_path / "step")
    options = {1: steps.options}
    async with start_suite(model, policy=None, num_kvtransfers=num_kvtransfers, options_of=options) as suite:
        sender, receiver = suite.engines
        attached = await prep_recv(suite, receiver, PROMPT, END, cache_salt="attached")
        filled = await prep_recv(suite, receiver, PROMPT, END, cache_salt="filled")
        for prepared, salt in ((attached, "attached"), (filled, "filled")):
            await remote_send(suite, sender, PROMPT, prepared.address, cache_salt=salt)
        unfilled = await prep_recv(suite, receiver, OTHER, len(OTHER))
        with steps.closed() as gate:
            waiting = asyncio.create_task(generate(suite, receiver, OTHER, address=unfilled.address))
            stream = asyncio.create_task(
                generate(suite, receiver, PROMPT, address=attached.address, max_tokens=400, salt="attached")
            )
            await gate.until(
                wait_for_load(receiver, lambda now: now.running_sequence_count == now.waiting_for_kv_count == 1)
            )
            for index in range(num_kvtransfers):
                end(suite.kvtransfers[index])
        with failing(CODES.ABORTED, "RESERVATION_GONE"):
            await waiting
        for index in range(num_kvtransfers):
            restart_service(suite, index)
        result = await generate(suite, receiver, PROMPT, address=filled.address, salt="filled")
        alone = await generate(suite, sender, PROMPT, max_tokens=400, salt="alone")
        assert result.token_ids == alone.token_ids[:16]
        assert (result.timing.transferred_token_count, result.timing.computed_token_count) == (END, 1)
        assert (await stream).token_ids == alone.token_ids
        again = await generate(suite, receiver, PROMPT, salt="filled")
        assert again.timing.matched_token_count == END, "the prefix cache is as it was"
        await check_transfer(suite, "after")


@each_transport
async def test_an_engine_restarts_and_the_others_keep_all_they_have(tmp_path: Path, num_kvtransfers: int) -> None:
    """The new engine begins empty in the same pool; nobody else lost anything."""
    async with start_suite(make_tiny_llama(tmp_path), policy=None, num_kvtransfers=num_kvtransfers) as suite:
        sender, receiver = suite.engines
        before = await prep_recv(suite, receiver, PROMPT, END, cache_salt="before")
        await remote_send(suite, sender, PROMPT, before.address, cache_salt="before")
        end(receiver.process)
        use_engine(suite, 1, suite.fleet.start_again(receiver.process))
        receiver = suite.engines[1]
        with failing(CODES.NOT_FOUND, "UNKNOWN_RESERVATION"):
            await generate(suite, receiver, PROMPT, address=before.address, salt="before")
        with failing(CODES.ABORTED, "RESERVATION_GONE"):
            await remote_send(suite, sender, PROMPT, before.address, cache_salt="before")
        prepared = await until_it_works(lambda: prep_recv(suite, receiver, PROMPT, END, cache_salt="before"))
        assert prepared.matched_token_count == 0
        sent = await remote_send(suite, sender, PROMPT, prepared.address, cache_salt="before")
        assert sent.timing.matched_token_count == END // 16 * 16, "the sender has its cache still"
        await generate(suite, receiver, PROMPT, address=prepared.address, salt="before")
        await check_transfer(suite, "after")


@each_transport
@pytest.mark.parametrize("index", [0, 1], ids=["sender", "receiver"])
async def test_an_engine_and_its_service_restart_at_once(tmp_path: Path, num_kvtransfers: int, index: int) -> None:
    """The engine is started before its service, so it must wait for it; the other engine goes on meanwhile."""
    model, steps = make_tiny_llama(tmp_path / "model"), StepGate(tmp_path / "step")
    options = {1 - index: steps.options}
    async with start_suite(model, policy=None, num_kvtransfers=num_kvtransfers, options_of=options) as suite:
        survivor = suite.engines[1 - index]
        await check_transfer(suite, "before")
        with steps.closed() as gate:
            stream = asyncio.create_task(generate(suite, survivor, PROMPT, max_tokens=400, salt="before"))
            await gate.until(wait_for_load(survivor, lambda now: now.running_sequence_count == 1))
            end(suite.engines[index].process)
            end(suite.kvtransfers[index % num_kvtransfers])
        process = suite.fleet.start_again(suite.engines[index].process)
        restart_service(suite, index % num_kvtransfers)
        use_engine(suite, index, process)
        alone = await generate(suite, suite.engines[index], PROMPT, max_tokens=400, salt="alone")
        assert (await stream).token_ids == alone.token_ids
        again = await generate(suite, survivor, PROMPT, salt="before")
        assert again.timing.computed_token_count == 1, "the survivor has its cache still"
        await check_transfer(suite, "after")
