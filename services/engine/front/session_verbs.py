"""PrepRecv and RemoteSend of one session, each a task of its own, so that none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from services.engine.core.api import RequestKey, Reserved
from services.engine.errors import QueueFull, RequestCancelled
from services.engine.front.streams import Caller, VerbAnswer
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing
from services.rpc.interceptor import internal_error

# That may be open in a session. A router has one a request at most, and no more requests than this unless told.
MAX_OPEN_VERBS = 1024
FULL_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class VerbCall:
    """A PrepRecv or RemoteSend. `run` carries it out and raises what it fails with; cancelling it cancels the verb."""

    key: RequestKey
    run: Callable[[], Coroutine[Any, Any, Reserved | Timing]]


class SessionVerbs:
    """Belongs to one session; close() it."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._open: dict[str, set[asyncio.Task[None]]] = {}  # by request id: a retry joins

    def begin(self, call: VerbCall) -> None:
        """Begins it; its answer, a refusal too, comes through the caller."""
        if self._caller.num_open_verbs >= MAX_OPEN_VERBS:
            full = QueueFull(f"{MAX_OPEN_VERBS} calls are open in this session.", retry_delay_s=FULL_RETRY_S)
            self.refuse(call.key.request_id, full)
            return
        self._caller.begin_verb()
        task = asyncio.create_task(self._carry_out(call))
        self._open.setdefault(call.key.request_id, set()).add(task)
        task.add_done_callback(partial(self._ended, call.key.request_id))

    def refuse(self, request_id: str, error: ServiceError) -> None:
        """Answers one that is not begun."""
        self._caller.begin_verb()
        self._caller.answer(VerbAnswer(request_id, error))

    def cancel(self, request_id: str) -> None:
        """Cancels what is open under that name."""
        for task in self._open.get(request_id, ()):
            task.cancel()

    async def close(self) -> None:
        """Cancels all that is open, and waits until it has ended."""
        tasks = [task for tasks in self._open.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, call: VerbCall) -> None:
        result: Reserved | Timing | ServiceError
        try:
            result = await call.run()
        except ServiceError as error:
            result = error
        except Exception as error:
            result = internal_error("Session", error)
        # Here and not when the task has ended, which is a turn of the event loop later.
        self._caller.answer(VerbAnswer(call.key.request_id, result))

    def _ended(self, request_id: str, task: asyncio.Task[None]) -> None:
        tasks = self._open[request_id]
        tasks.discard(task)
        if not tasks:
            del self._open[request_id]
        if task.cancelled():
            self._caller.answer(VerbAnswer(request_id, RequestCancelled("The call was cancelled.")))
