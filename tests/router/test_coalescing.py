"""Tokens on their way to clients: the first at once, the others merged only where their reader is behind."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.fakes import FakeEngine, Fault
from tests.router.harness import PROMPT, model, running


async def pieces_of(call: Any) -> list[list[int]]:
    """Token ids of each message that has any."""
    return [list(piece.token_ids) async for piece in call if piece.token_ids]


async def test_the_first_token_is_not_held_back_for_others() -> None:
    engine = FakeEngine(model(), "a")
    engine.faults["StartGenerate"] = Fault(after_tokens=1)  # and then nothing
    async with running(engines=[engine]) as suite:
        call = suite.stream(max_tokens=50)
        async with asyncio.timeout(60):
            assert list((await call.read()).token_ids) == model().generate(PROMPT, 1)
        call.cancel()


async def test_a_token_is_not_held_back_for_the_next() -> None:
    engine = FakeEngine(model(), "a")
    engine.faults["StartGenerate"] = Fault(after_tokens=3)
    async with running(engines=[engine]) as suite:
        call, tokens = suite.stream(max_tokens=50), list[int]()
        async with asyncio.timeout(60):
            while len(tokens) < 3:
                tokens += (await call.read()).token_ids
        assert tokens == model().generate(PROMPT, 3)
        call.cancel()


async def test_many_streams_at_once_lose_and_reorder_nothing() -> None:
    async with running() as suite:
        prompts = [tuple(range(5 + number, 60)) for number in range(8)]
        calls = [suite.stream(prompt, max_tokens=60, ignore_eos=True) for prompt in prompts]
        answers = await asyncio.gather(*map(pieces_of, calls))
        for prompt, pieces in zip(prompts, answers, strict=True):
            assert [token for piece in pieces for token in piece] == model().generate(prompt, 60)
