"""What is known of an engine's work before it tells: prompts in their turn, and answers that come to their end."""

from __future__ import annotations

import asyncio

from services.router.fleet.underway import Answer, Computing, Pledge, Underway
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


def test_who_gives_up_behind_another_does_not_begin_that_one_anew() -> None:
    async def main() -> None:
        underway = Underway()
        with Computing(underway, 100):
            with Computing(underway, 40):
                await asyncio.sleep(1.0)
            assert underway.head == (100, 1.0)

    run(main())


def test_what_is_only_pledged_waits_behind_what_is_computed_and_is_not_computed() -> None:
    async def main() -> None:
        underway = Underway()
        early = Pledge(underway, 30)
        await asyncio.sleep(1.0)
        assert (underway.prompt_tokens, underway.asked_tokens, underway.head) == (30, 0, (0, 0.0))
        with Computing(underway, 100):
            await asyncio.sleep(1.0)
            late = Pledge(underway, 7)
            early.over()
            assert (underway.prompt_tokens, underway.asked_tokens, underway.head) == (107, 100, (100, 1.0))
            late.over()
        assert (underway.prompt_tokens, underway.asked_tokens) == (0, 0)

    run(main())


def test_an_answer_that_outlives_what_was_expected_may_be_as_long_again() -> None:
    answer = Answer(10)
    assert answer.left == 10
    answer.generated = 9
    assert answer.left == 1
    answer.generated = 10
    assert answer.left == 10
