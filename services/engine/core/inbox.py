"""Where other threads leave commands for the loop thread."""

from __future__ import annotations

import threading
from collections import deque

from services.engine.core.api import Command


class Inbox:
    """A queue that closes: a command is either taken by the loop thread or refused to whoever brings it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._commands: deque[Command] = deque()
        self._is_closed = False

    def put(self, command: Command) -> bool:
        """Leaves a command and wakes the loop thread. Any thread; False if the inbox is closed."""
        with self._lock:
            if self._is_closed:
                return False
            self._commands.append(command)
        self._arrived.set()
        return True

    def take(self, wait_s: float | None) -> deque[Command]:
        """What has arrived; if nothing has, waits so long for it, None without a bound. Loop thread only."""
        self._arrived.wait(wait_s)
        with self._lock:
            self._arrived.clear()
            commands, self._commands = self._commands, deque()
        return commands

    def wake(self) -> None:
        """Ends a wait in take() without a command."""
        self._arrived.set()

    def close(self) -> deque[Command]:
        """Takes no more commands. Returns those that nobody took."""
        with self._lock:
            self._is_closed = True
            commands, self._commands = self._commands, deque()
        return commands
