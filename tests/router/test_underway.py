"""What is known of an engine's work before it tells: prompts in their turn, and answers that come to their end."""

from __future__ import annotations

import asyncio

from services.router.fleet.underway import Answer, Computing, Underway
from services.rpc.virtual_loop import run


def test_a_prompt_is_computed_from_when_the_one_before_it_was_done() -> None:
    async def main() -> None:
        underway = Underway()
        assert underway.head == (0, 0.0)
        await asyncio.sleep(2.0)
        first, second = Computing(underway, 100), Computing(underway, 40)
        first_computed = first.__enter__()
        second.__enter__()
        await asyncio.sleep(1.0)
        assert (underway.prompt_tokens, underway.head) == (140, (100, 1.0))
        first_computed()
        await asyncio.sleep(0.5)
        assert (underway.prompt_tokens, underway.head) == (40, (40, 0.5))
        first.__exit__()
        assert underway.prompt_tokens == 40
        second.__exit__()
        assert (underway.prompt_tokens, underway.head) == (0, (0, 0.0))

    run(main())


def test_an_answer_that_outlives_what_was_expected_may_be_as_long_again() -> None:
    answer = Answer(10)
    assert answer.left == 10
    answer.generated = 9
    assert answer.left == 1
    answer.generated = 10
    assert answer.left == 10
