"""Streams of the service, read in the background, and what a test waits for in them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from tests.kvtransfer.port import PATIENCE_S

LAST_STATES = (pb.PUSH_STATE_DONE, pb.PUSH_STATE_COMMITTED)


class _Reader:
    """A stream that is read by a task of its own."""

    def __init__(self, stream: AsyncGenerator[Any, None]) -> None:
        self._news = asyncio.Condition()
        self._task = asyncio.create_task(self._read(stream))

    def take(self, message: Any) -> None:
        """One more message."""
        raise NotImplementedError

    async def wait_for(self, reached: Callable[[], bool]) -> None:
        """Raises what the stream failed with, if it ends before."""
        async with asyncio.timeout(PATIENCE_S), self._news:
            await self._news.wait_for(lambda: reached() or self._task.done())
        if not reached():
            self._task.result()
            raise AssertionError("the stream ended before")

    async def close(self) -> None:
        """As a client leaves."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self, stream: AsyncGenerator[Any, None]) -> None:
        self._task.add_done_callback(lambda _: asyncio.ensure_future(self._wake()))
        async with aclosing(stream):
            async for message in stream:
                self.take(message)
                await self._wake()

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()


class Pushing(_Reader):
    """A push under way."""

    def __init__(self, stream: AsyncGenerator[Any, None]) -> None:
        self.messages: list[Any] = []
        super().__init__(stream)

    def take(self, message: Any) -> None:
        self.messages.append(message)

    async def done(self) -> Any:
        """The last message, or what the push failed with."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([self._task])
        self._task.result()
        assert self.messages[-1].state in LAST_STATES
        return self.messages[-1]

    async def opened(self) -> None:
        """The attempt is open."""
        await self.layers(0)

    async def layers(self, count: int) -> None:
        """So many layers are in place. Raises what the push failed with, if it ends before."""
        await self.wait_for(lambda: bool(self.messages) and self.messages[-1].layers_done >= count)


class Watching(_Reader):
    """WatchGrants under way: the newest condition of each grant, and all batches."""

    def __init__(self, stream: AsyncGenerator[Any, None]) -> None:
        self.events: dict[str, Any] = {}
        self.batches: list[Any] = []
        super().__init__(stream)

    def take(self, message: Any) -> None:
        self.batches.append(message)
        self.events.update({event.reservation_id: event for event in message.events})

    async def until(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the newest conditions are such; a KeyError means not yet."""

        def reached() -> bool:
            with contextlib.suppress(KeyError):
                return condition(self.events)
            return False

        await self.wait_for(reached)
