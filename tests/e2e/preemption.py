"""An engine that has to preempt: several sequences have room to begin, and no two of them have room to end together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.compare import CLOSE_CALL, assert_same_generation
from tests.e2e.suite import Generated, arrived, generate, idle, start_suite, wait_for_load
from tests.faults.gates import StepGate

PAGE_SIZE = 4


async def assert_preempted_equals_undisturbed(
    model: Path,
    steps: StepGate,
    prompts: Sequence[list[int]],
    undisturbed: Sequence[Generated],
    max_tokens: int,
    *,
    options: Sequence[str] = (),
    tolerance: float = CLOSE_CALL,
) -> None:
    """Starts such an engine, with more `options`, and asks it for all `prompts` at the gate of `steps`; they begin
    together and must answer, with `max_tokens` each, what they answered alone."""
    longest = max(map(len, prompts)) + max_tokens
    async with start_suite(
        model,
        num_engines=1,
        policy=None,
        page_size=PAGE_SIZE,
        page_count=longest // PAGE_SIZE + 3,
        engine_options=(*options, "--max-context", str(longest), *steps.options),
    ) as small:
        one = small.engines[0]
        with steps.closed() as gate:
            asked = asyncio.gather(
                *(
                    generate(small, one, prompt, max_tokens=max_tokens, salt=f"p {i}")
                    for i, prompt in enumerate(prompts)
                )
            )
            await gate.reached()
            await arrived(one)
        got = await asked
        assert sum(result.timing.preemption_count for result in got) > 0
        for prompt, want, result in zip(prompts, undisturbed, got, strict=True):

            async def forced(tokens: list[int], prompt: list[int] = prompt) -> Generated:
                return await generate(small, one, prompt, forced=tokens)

            await assert_same_generation(want, result.token_ids, forced, tolerance)
        await wait_for_load(one, idle)
