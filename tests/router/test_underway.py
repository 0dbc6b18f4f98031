"""What is known of an engine's work before it tells: prompts in their turn, and answers that come to their end."""

from __future__ import annotations

import asyncio

from services.router.fleet.underway import Answer, Underway
from services.rpc.virtual_loop import run


def test_a_prompt_is_computed_from_when_the_one_before_it_was_done() -> None:
    async def main() -> None:
        underway = Underway()
        assert underway.head == (0, 0.0)
        await asyncio.sleep(2.0)
        first, second = underway.begin_prompt(100), underway.begin_prompt(40)
        await asyncio.sleep(1.0)
        assert (underway.prompt_tokens, underway.head) == (140, (100, 1.0))
        assert underway.end_prompt(first)
        await asyncio.sleep(0.5)
        assert (underway.prompt_tokens, underway.head) == (40, (40, 0.5))
        assert not underway.end_prompt(first)
        assert underway.end_prompt(second)
        assert (underway.prompt_tokens, underway.head) == (0, (0, 0.0))

    run(main())


def test_an_answer_that_outlives_what_was_expected_may_be_as_long_again() -> None:
    answer = Answer(10)
    assert answer.left == 10
    answer.generated = 9
    assert answer.left == 1
    answer.generated = 10
    assert answer.left == 10
