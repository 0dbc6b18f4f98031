"""KV that is altered between two services is found by its checksum: a typed error, and never a wrong token."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.errors import failing
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import ask, generate, idle, prep_recv, remote_send, start_suite, wait_for_load
from tests.faults.relay import data_port_of, relay
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

PROMPT = mixed_prompts(10, 500, 300)[-1]
END = len(PROMPT) - 1


async def test_altered_kv_never_becomes_a_token(tmp_path: Path) -> None:
    """Each service is reached through a relay of its own, since the router sends either way."""
    async with AsyncExitStack() as stack:
        relays = [await stack.enter_async_context(relay()) for _ in range(2)]
        options = {i: ["--checksums", "--data-advertise", each.address] for i, each in enumerate(relays)}
        suite = await stack.enter_async_context(
            start_suite(make_tiny_llama(tmp_path), num_kvtransfers=2, kvtransfer_options_of=options)
        )
        for each, service in zip(relays, suite.kvtransfers, strict=True):
            each.target_port = data_port_of(service)
            each.alters = True
        sender, receiver = suite.engines
        expected = (await generate(suite, sender, PROMPT, salt="alone")).token_ids
        prepared = await prep_recv(suite, receiver, PROMPT, END, cache_salt="moved")
        waiting = asyncio.create_task(generate(suite, receiver, PROMPT, address=prepared.address, salt="moved"))
        await wait_for_load(receiver, lambda report: report.waiting_for_kv_count == 1)
        with failing(grpc.StatusCode.DATA_LOSS, "CHECKSUM_MISMATCH"):
            await remote_send(suite, sender, PROMPT, prepared.address, cache_salt="moved")
        assert relays[1].num_altered > 0
        assert not waiting.done(), "something of what was altered counts"

        answer = await ask(suite, PROMPT, "disaggregated", salt="routed")
        assert answer.token_ids == expected
        assert [leg.verb for leg in answer.legs][-1] == sampling.VERB_START_GENERATE
        assert answer.legs[-1].timing.transferred_token_count == 0, "it was served without moving KV"

        for each in relays:
            each.alters = False
        await remote_send(suite, sender, PROMPT, prepared.address, attempt=2, cache_salt="moved")
        result = await waiting
        assert result.token_ids == expected
        assert (result.timing.transferred_token_count, result.timing.computed_token_count) == (END, 1)
        for each in suite.engines:
            await wait_for_load(each, idle)
