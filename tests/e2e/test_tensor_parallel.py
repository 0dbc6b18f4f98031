"""One model on one, two and four ranks: the same tokens, alone and with a KV transfer service; a rank's death."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from pathlib import Path

import grpc
import pytest

from services.cli.errors import ServiceFailed
from services.cli.fleet import Fleet
from tests.e2e.errors import outcome
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Suite, generate, idle, prep_recv, remote_send, start_suite, wait_for_load
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PROMPTS = mixed_prompts(10, 500, 200)[3:]


def four_heads(folder: Path) -> Path:
    """A model that four ranks can share."""
    return make_tiny_llama(folder, heads=8, kv_heads=4)


def ranks_of(process_id: int) -> list[int]:
    """Process ids of the other ranks of an engine."""
    found: list[int] = []
    for thread in Path(f"/proc/{process_id}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread, or a child, that has just ended
            children = (thread / "children").read_text().split()
            found += [int(pid) for pid in children if "parallel.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    return sorted(found)


async def test_the_same_tokens(tmp_path: Path) -> None:
    """Engine 0 is whole, the others have two and four ranks; every pair exchanges KV, through pools of whole pages."""
    options = {1: ["--tp", "2"], 2: ["--tp", "4"]}
    async with start_suite(
        four_heads(tmp_path), num_engines=3, policy=None, options_of=options, kv_memory_mib=32
    ) as suite:
        whole, *split = suite.engines
        expected = [(await generate(suite, whole, prompt)).token_ids for prompt in PROMPTS]
        for engine in split:
            assert [(await generate(suite, engine, prompt)).token_ids for prompt in PROMPTS] == expected
        rated = [await generate(suite, engine, PROMPTS[-1], prompt_logprobs=2) for engine in suite.engines]
        assert len(rated[0].prompt_logprobs.logprobs) == len(PROMPTS[-1]) - 1
        for each in rated[1:]:
            assert list(each.prompt_logprobs.logprobs) == pytest.approx(
                list(rated[0].prompt_logprobs.logprobs), abs=1e-4
            )
            assert each.token_ids == expected[-1]
        for turn, (sender, receiver) in enumerate(((0, 1), (1, 0), (1, 2), (2, 1))):
            salt = f"turn {turn}"
            assert await moved(suite, sender, receiver, salt) == expected[-1]
        for engine in suite.engines:
            await wait_for_load(engine, idle)


async def moved(suite: Suite, sender: int, receiver: int, salt: str) -> list[int]:
    """Tokens after KV of all but the last token went from one engine to another."""
    prompt, (p, d) = PROMPTS[-1], (suite.engines[sender], suite.engines[receiver])
    prepared = await prep_recv(suite, d, prompt, len(prompt) - 1, cache_salt=salt)
    await remote_send(suite, p, prompt, prepared.address, cache_salt=salt)
    result = await generate(suite, d, prompt, address=prepared.address, salt=salt)
    assert result.timing.computed_token_count == 1
    return result.token_ids


async def test_a_rank_dies(tmp_path: Path) -> None:
    """The replica ends at once and says why, and takes all its ranks along; the other engine goes on."""
    steps = StepGate(tmp_path / "step")
    options = {0: ["--tp", "2", *steps.options], 1: ["--tp", "2"]}
    async with start_suite(four_heads(tmp_path / "m"), policy=None, options_of=options, kv_memory_mib=32) as suite:
        first, second = suite.engines
        (rank,) = ranks_of(first.process.pid)
        with steps.closed() as gate:
            streaming = asyncio.ensure_future(outcome(generate(suite, first, PROMPTS[-1], max_tokens=100)))
            await gate.until(wait_for_load(first, lambda report: report.running_sequence_count == 1))
            os.kill(rank, signal.SIGKILL)
        assert await streaming is grpc.StatusCode.UNAVAILABLE
        assert first.process.wait(60) == 1
        assert "a rank has ended" in first.process.log_path.read_text()
        assert len((await generate(suite, second, PROMPTS[-1])).token_ids) == 16
        (rank,) = ranks_of(second.process.pid)
        end = os.pidfd_open(rank)
        os.kill(second.process.pid, signal.SIGKILL)  # alone, not its group
        readable, _, _ = await asyncio.to_thread(select.select, [end], [], [], 60)
        assert readable
        os.close(end)


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_an_engine_that_ends_while_its_ranks_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """No rank and no file stay behind."""
    model, scratch, logs = four_heads(tmp_path / "model"), tmp_path / "scratch", tmp_path / "logs"
    scratch.mkdir()
    logs.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with Fleet(logs) as fleet:
        engine = fleet.start_engine("engine", model, None, extra=["--tp", "2"])
        ranks: list[int] = []
        while not ranks:
            assert engine.poll() is None, engine.log_tail()
            ranks = ranks_of(engine.pid)
        (rank,) = ranks
        end = os.pidfd_open(rank)
        getattr(engine, how)()
        engine.wait(60)
        readable, _, _ = select.select([end], [], [], 60)
        assert readable
        os.close(end)
    assert not list(scratch.glob("microserve-*"))


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    with Fleet() as fleet:
        engine = fleet.start_engine("engine", make_tiny_llama(tmp_path), None, extra=["--tp", "4"])
        with pytest.raises(ServiceFailed, match="2 key-value heads do not divide among 4 ranks"):
            engine.wait_ready(120)
        assert engine.wait(60) == 2
