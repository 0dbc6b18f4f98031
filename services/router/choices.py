"""Several answers to one prompt: the first as the policy wills, the others where the prompt is then cached."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar

from services.router.answer import Answer
from services.router.asking import Ask, Beside
from services.router.service import GenerationService

Item = TypeVar("Item")


async def generate_choices(service: GenerationService, ask: Ask, n: int) -> AsyncGenerator[tuple[int, Answer], None]:
    """(choice, piece of its answer) as they come; choice 0 is what n = 1 gives.

    The others begin with the first token of choice 0, on its engine: the prompt's pages are there, whichever way the
    policy brought them. What is told of the prompt comes with choice 0 alone. One that fails ends all. Closing the
    generator ends all work for it.
    """
    if n == 1:
        async with aclosing(service.generate(ask)) as answers:
            async for answer in answers:
                yield 0, answer
        return
    # All of them at once: a refusal after the first token would be none of an answer that has begun.
    with service.entering(ask, n):
        ask = replace(ask, request_id=ask.request_id or secrets.token_hex(8), has_entered=True)
        async with aclosing(service.generate(ask)) as answers:
            first = await anext(answers)
            yield 0, first
            others = [service.generate(_variant(ask, index, first)) for index in range(1, n)]
            async with aclosing(merge([answers, *others])) as pieces:
                async for piece in pieces:
                    yield piece


def deliver_choices(
    service: GenerationService,
    ask: Ask,
    n: int,
    take: Callable[[int, Answer], bool],
    wait_for_room: Callable[[], Awaitable[None]],
) -> Coroutine[Any, Any, None]:
    """As generate_choices, for who need not wait to pass a piece on: see GenerationService.deliver."""
    if n == 1:
        return service.deliver(ask, partial(take, 0), wait_for_room)
    return _deliver_all(service, ask, n, take, wait_for_room)


async def _deliver_all(
    service: GenerationService,
    ask: Ask,
    n: int,
    take: Callable[[int, Answer], bool],
    wait_for_room: Callable[[], Awaitable[None]],
) -> None:
    async with aclosing(generate_choices(service, ask, n)) as answers:
        async for choice, answer in answers:
            if not take(choice, answer):
                await wait_for_room()


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    """(index of the stream, item) as they come. The first stream that fails ends all; each is closed in the end.

    A consumer that is slow holds the streams up: at most one item of each waits.
    """
    queue: asyncio.Queue[tuple[int, Item] | _Ended] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put((index, item))
        except (Exception, asyncio.CancelledError) as error:
            if _is_cancelled():  # by the end below
                raise
            # A cancellation that is not ours is a failure like others; whoever reads knows that nobody asked for it.
            await queue.put(_Ended(error))
        else:
            await queue.put(_Ended())

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_live = len(pumps)
        while num_live:
            got = await queue.get()
            if not isinstance(got, _Ended):
                yield got
            elif got.error is not None:
                raise got.error
            else:
                num_live -= 1
    finally:
        for task in pumps:
            task.cancel()
        if pumps:
            await asyncio.wait(pumps)


@dataclass(frozen=True, slots=True)
class _Ended:
    """A stream has ended, perhaps by failing."""

    error: BaseException | None = None


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _variant(ask: Ask, index: int, first: Answer) -> Ask:
    """The ask of another choice: the same but for name and seed, next to the first."""
    assert first.program is not None
    digest = blake2b(b"%d/%d" % (ask.sampling.seed, index), digest_size=8).digest()
    return replace(
        ask,
        choice=ask.choice + index,
        sampling=replace(ask.sampling, seed=int.from_bytes(digest, "little"), prompt_logprobs=None),
        beside=Beside(first.program, first.engine),
    )
