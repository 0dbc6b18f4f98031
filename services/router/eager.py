"""Tasks that take their first step at once, which asyncio has from Python 3.12 on, and here 3.11 too.

A task of asyncio begins in the next turn of the event loop, behind all that is ready by then: a request that passes
through three tasks on its way to an engine waits for three turns.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Generator
from contextvars import copy_context
from typing import Any, NoReturn, TypeVar

Result = TypeVar("Result")


def begin(work: Coroutine[Any, Any, Result], name: str) -> asyncio.Task[Result]:
    """A task of `work`, which has come as far as it does without waiting. It is the current task meanwhile."""
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, name=name, eager_start=True)
    # By the functions that asyncio offers to those who write their own tasks.
    context = copy_context()
    outer = asyncio.current_task(loop)
    begun = _Begun(work)
    task = loop.create_task(begun, name=name, context=context)
    if outer is not None:
        asyncio.tasks._leave_task(loop, outer)
    asyncio.tasks._enter_task(loop, task)
    try:
        context.run(begun.begin)
    finally:
        asyncio.tasks._leave_task(loop, task)
        if outer is not None:
            asyncio.tasks._enter_task(loop, outer)
    return task


class _Begun(Coroutine[Any, Any, Result]):
    """For Python 3.11: work that takes its first step in `begin`; the first step of its task learns what came of it."""

    def __init__(self, work: Coroutine[Any, Any, Result]) -> None:
        self._work = work
        self._waits_for: asyncio.Future[Any] | None = None  # None, as everywhere in asyncio: for the next turn
        self._end: BaseException | None = None

    def begin(self) -> None:
        """Never raises: how the work ended is its task's outcome."""
        try:
            self._waits_for = self._work.send(None)
        except BaseException as end:  # StopIteration among them, by which coroutines return
            self._end = end

    def send(self, value: Any) -> Any:
        self._tell()
        return self._waits_for

    def throw(self, *error: Any) -> Any:
        self._tell()
        if self._waits_for is not None:  # the task was cancelled before it knew whom to pass that on to
            self._waits_for.cancel()
        return self._work.throw(*error)

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, NoReturn]:
        raise TypeError("only its task drives it")

    def _tell(self) -> None:
        """Raises how the work ended, if it has. From now on the task drives the work with nothing in between."""
        if self._end is not None:
            end, self._end = self._end, None
            try:
                raise end
            finally:
                del end  # whose traceback holds this frame
        self.send, self.throw = self._work.send, self._work.throw  # type: ignore[assignment, method-assign]
