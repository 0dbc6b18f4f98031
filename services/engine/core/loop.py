"""The engine's loop thread: it alone touches the core."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from services.engine.core.api import Command
from services.engine.core.core import EngineCore
from services.engine.core.inbox import Inbox
from services.engine.core.ports import EngineListener
from services.engine.errors import EngineStopped

_log = logging.getLogger(__name__)


class EngineLoop:
    """Runs a core on a thread of its own. It steps while there is work and otherwise waits for a command or a timer.

    `clock` must be the core's. If the core's state cannot be trusted any more, everything open is answered
    UNAVAILABLE, the listener hears on_fatal, and later commands are refused.
    """

    def __init__(
        self,
        core: EngineCore,
        listener: EngineListener,
        *,
        clock: Callable[[], float] = time.monotonic,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` is called first on the thread: what tensors are computed with may want to know it."""
        self._core = core
        self._listener = listener
        self._clock = clock
        self._prepare = prepare
        self._inbox = Inbox()
        self._taken: deque[Command] = deque()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Hands a command to the loop. Any thread; it is answered even if the loop has ended."""
        if not self._inbox.put(command):
            self._core.refuse(command, EngineStopped("The engine has stopped."))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the loop after the step that runs, and answers everything open. Returns whether the thread has ended."""
        self._is_stopping.set()
        self._inbox.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._prepare()
            self._loop()
        except BaseException as error:
            _log.exception("the engine loop cannot go on")
            failure = error
        for command in (*self._taken, *self._inbox.close()):
            self._core.refuse(command, EngineStopped("The engine has stopped."))
        try:
            self._core.stop()
        except Exception as error:  # of a state that could not be trusted: the listener answers what is left
            _log.exception("the engine could not tell everybody of its end")
            failure = failure or error
        if failure is not None:
            self._listener.on_fatal(failure)

    def _loop(self) -> None:
        is_busy = False
        while not self._is_stopping.is_set():
            self._taken = self._inbox.take(0.0 if is_busy else self._wait_s())
            is_busy = self._core.step(self._take_each())

    def _take_each(self) -> Iterator[Command]:
        """The commands one by one, so that those after one that proves fatal are answered too."""
        while self._taken:
            yield self._taken.popleft()

    def _wait_s(self) -> float | None:
        due = self._core.next_timer()
        return None if due is None else min(max(0.0, due - self._clock()), threading.TIMEOUT_MAX)
