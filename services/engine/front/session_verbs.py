"""PrepRecv and RemoteSend of one session, each a task of its own, so that none waits for another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from services.engine.core.api import RequestKey, Reserved
from services.engine.errors import QueueFull, RequestCancelled
from services.engine.front.streams import Caller, VerbAnswer
from services.protocol.errors import ServiceError
from services.protocol.timing import Timing
from services.rpc.interceptor import RPC_SECONDS, internal_error

# That may be open in a session. A router has one a request at most, and no more requests than this unless told.
MAX_OPEN_VERBS = 1024
FULL_RETRY_S = 0.1


@dataclass(frozen=True, slots=True)
class VerbCall:
    """A PrepRecv or RemoteSend, `method` as metrics name it. `run` carries it out and raises what it fails with;
    cancelling it cancels the verb."""

    key: RequestKey
    method: str
    run: Callable[[], Coroutine[Any, Any, Reserved | Timing]]


class SessionVerbs:
    """Belongs to one session, which cancels them at its end. The metrics count each as a call of its own."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._open: dict[str, set[asyncio.Task[None]]] = {}  # by request id: a retry joins

    def begin(self, call: VerbCall) -> None:
        """Begins it; its answer, a refusal too, comes through the caller."""
        if self._caller.num_open_verbs >= MAX_OPEN_VERBS:
            full = QueueFull(f"{MAX_OPEN_VERBS} calls are open in this session.", retry_delay_s=FULL_RETRY_S)
            self.refuse(call.key.request_id, call.method, full)
            return
        self._caller.begin_verb()
        begin = time.monotonic()
        task = asyncio.create_task(self._carry_out(call, begin))
        self._open.setdefault(call.key.request_id, set()).add(task)
        task.add_done_callback(partial(self._task_ended, call, begin))

    def refuse(self, request_id: str, method: str, error: ServiceError) -> None:
        """Answers one that is not begun."""
        self._caller.begin_verb()
        self._answer(VerbAnswer(request_id, error), method, time.monotonic())

    def cancel(self, request_id: str) -> None:
        """Cancels what is open under that name."""
        for task in self._open.get(request_id, ()):
            task.cancel()

    def cancel_all(self) -> None:
        """Cancels what is open under any name."""
        for request_id in self._open:
            self.cancel(request_id)

    async def ended(self) -> None:
        """Returns when all that is open now has ended."""
        tasks = [task for tasks in self._open.values() for task in tasks]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, call: VerbCall, begin: float) -> None:
        result: Reserved | Timing | ServiceError
        try:
            result = await call.run()
        except ServiceError as error:
            result = error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody asked for it: somebody cancelled a task that the verb was waiting for.
            result = internal_error(call.method, error)
        except Exception as error:
            result = internal_error(call.method, error)
        # Here and not when the task has ended, which is a turn of the event loop later.
        self._answer(VerbAnswer(call.key.request_id, result), call.method, begin)

    def _task_ended(self, call: VerbCall, begin: float, task: asyncio.Task[None]) -> None:
        request_id = call.key.request_id
        tasks = self._open[request_id]
        tasks.discard(task)
        if not tasks:
            del self._open[request_id]
        # Here, because one that was cancelled before its first turn has not run at all.
        if task.cancelled():
            self._answer(VerbAnswer(request_id, RequestCancelled("The call was cancelled.")), call.method, begin)

    def _answer(self, answer: VerbAnswer, method: str, begin: float) -> None:
        code = answer.result.code.name if isinstance(answer.result, ServiceError) else "OK"
        RPC_SECONDS.labels(method, code).observe(time.monotonic() - begin)
        self._caller.answer(answer)
