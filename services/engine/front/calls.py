"""One question to the loop thread and its one answer, for handlers of unary calls.

The loop thread answers through a reply function, on its own thread. A handler that is cancelled before the answer
(the client left, its deadline passed, the server stops) tells the loop thread, so that nothing stays behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.engine.core.api import Cancel, Command, Reply, RequestKey
from services.engine.errors import DeadlineExceeded
from services.engine.front.outbox import Outbox
from services.protocol.errors import ServiceError

T = TypeVar("T")

# Answered verbs whose duplicates may still be under way; a retry follows its original within seconds.
MAX_ANSWERED = 4096


class Calls:
    """Belongs to one event loop, which all methods are called on."""

    def __init__(
        self, submit: Callable[[Command], None], on_abandoned: Callable[[RequestKey], None], outbox: Outbox
    ) -> None:
        """`on_abandoned` is called when the last caller of a verb has left, before the loop thread hears of it.
        `outbox` is what answers come through."""
        self._submit = submit
        self._outbox = outbox
        self._on_abandoned = on_abandoned
        self._num_askers: Counter[RequestKey] = Counter()
        self._open: set[asyncio.Future[Any]] = set()
        self._answered: OrderedDict[RequestKey, None] = OrderedDict()
        self._failure: ServiceError | None = None

    async def ask(self, make: Callable[[Reply[T]], Command]) -> T:
        """Submits the command that `make` builds and returns its answer or raises the error it was answered with.

        Cancelling leaves the command to take effect unheard.
        """
        answer: asyncio.Future[T | ServiceError] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            raise self._failure
        self._submit(make(lambda value: self._outbox.post(lambda: _settle(answer, value))))
        self._open.add(answer)
        try:
            value = await answer
        finally:
            self._open.discard(answer)
        if isinstance(value, ServiceError):
            raise value
        return value

    async def ask_for(self, key: RequestKey, make: Callable[[Reply[T]], Command]) -> T:
        """As ask, for a verb. Cancelling cancels the verb, unless an earlier call of that name has its answer.

        A retry shares what its original got: when a mesh takes the retry back, the original must live on.
        """
        self._num_askers[key] += 1
        try:
            answer = await self.ask(make)
        except asyncio.CancelledError:
            if key not in self._answered:
                if self._num_askers[key] == 1:
                    self._on_abandoned(key)
                self._submit(Cancel(key))
            raise
        finally:
            self._num_askers[key] -= 1
            if not self._num_askers[key]:
                del self._num_askers[key]
        self._answered[key] = None
        if len(self._answered) > MAX_ANSWERED:
            self._answered.popitem(last=False)
        return answer

    def fail(self, error: ServiceError) -> None:
        """The loop thread is gone: every open and every later question is answered with `error`."""
        self._failure = error
        for answer in self._open:
            _settle(answer, error)


async def within(timeout_s: float | None, answer: Coroutine[Any, Any, T]) -> T:
    """What `answer` gives, which is cancelled when the time is over. DeadlineExceeded."""
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        raise DeadlineExceeded("The time allowed for the call is over.") from None


def _settle(answer: asyncio.Future[Any], value: object) -> None:
    if not answer.done():
        answer.set_result(value)
