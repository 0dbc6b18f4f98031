"""Work that must happen even when the request it belongs to is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from services.protocol.errors import ServiceError
from services.router.metrics import CLEANUP_FAILURES

log = logging.getLogger(__name__)

# Longer than a release takes; an engine that does not answer at all must not hold up the client.
_MOMENT_S = 1.0


class Cleanup:
    """Runs releases and cancels shielded from cancellation and bounded in time. Failures are counted and logged:
    what could not be released ends with its lease."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, what: str, work: Coroutine[Any, Any, object]) -> asyncio.Task[None]:
        """Starts it; nobody needs to wait."""
        task = asyncio.create_task(self._bounded(what, work), name=what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, what: str, work: Coroutine[Any, Any, object]) -> None:
        """Waits for it a moment. What takes longer, or whose caller is cancelled, goes on by itself. Never raises what
        `work` raised."""
        await asyncio.wait({self.spawn(what, work)}, timeout=_MOMENT_S)

    async def drain(self) -> None:
        """Waits until nothing runs, at most the limit."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limit_s
        # Again and again, because tasks begin others.
        while self._tasks and (left_s := deadline - loop.time()) > 0:
            await asyncio.wait(self._tasks, timeout=left_s)

    async def _bounded(self, what: str, work: Coroutine[Any, Any, object]) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await work
        except (ServiceError, TimeoutError) as error:
            reason = error.reason if isinstance(error, ServiceError) else "TIMEOUT"
            CLEANUP_FAILURES.labels(what, reason).inc()
            log.warning("cleanup failed", extra={"fields": {"what": what, "reason": reason}})
        except Exception:
            CLEANUP_FAILURES.labels(what, "INTERNAL").inc()
            log.exception("cleanup failed", extra={"fields": {"what": what}})
