"""The meeting point of the two threads: commands go to the loop thread, and what it says is handed on.

The loop thread calls the listener's methods; what it says in one go costs it one wake-up of the event loop at most,
whatever the number of calls, sequences and readers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

from services.engine.core.api import Command, Drain, Load, Reply, RequestKey, SequenceOutput
from services.engine.errors import EngineDraining, EngineStopped
from services.engine.front.cache_watch import CacheWatches
from services.engine.front.calls import Calls
from services.engine.front.loads import LoadBoard
from services.engine.front.outbox import Outbox
from services.engine.front.streams import Streams
from services.engine.metrics import count_outputs

log = logging.getLogger(__name__)


class Front:
    """Implements EngineListener. Everything but the listener's methods belongs to the event loop it was made on.

    `submit` is the loop thread's inbox. `on_stopped` is called once if the loop thread fails, `on_abandoned` when the
    last caller of a verb has left.
    """

    def __init__(
        self,
        submit: Callable[[Command], None],
        on_stopped: Callable[[], None],
        on_abandoned: Callable[[RequestKey], None] = lambda key: None,
    ) -> None:
        self._outbox = Outbox()
        self.calls = Calls(submit, on_abandoned, self._outbox)
        self.streams = Streams(submit)
        self.loads = LoadBoard(self._outbox)
        self.cache = CacheWatches(submit, self._outbox)
        self._on_stopped = on_stopped

    def on_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        """See EngineListener."""
        self._outbox.post(lambda: self._deliver(outputs))

    def on_load(self, load: Load) -> None:
        """See EngineListener."""
        self.loads.publish(load)

    def on_fatal(self, error: BaseException) -> None:
        """See EngineListener."""
        self._outbox.post(lambda: self._stopped(error))

    async def drain(self) -> None:
        """Lets the engine finish what it has and take nothing new; then ends the calls that only watch."""
        ask: Callable[[Reply[None]], Command] = Drain
        try:
            # A loop thread that is gone has nothing left to finish.
            with contextlib.suppress(EngineStopped):
                await self.calls.ask(ask)
        finally:
            # Also when the grace is over: a watcher would otherwise hold the server up for nothing.
            self._end_watches(EngineDraining("The engine is shutting down."))
            self.streams.end_callers()

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        count_outputs(outputs)
        self.streams.deliver(outputs)

    def _stopped(self, error: BaseException) -> None:
        log.critical("the engine's loop failed", exc_info=error)
        stopped = EngineStopped("The engine has failed and serves no more.")
        self.calls.fail(stopped)
        self.streams.fail(stopped)
        self._end_watches(stopped)
        self._on_stopped()

    def _end_watches(self, error: EngineDraining | EngineStopped) -> None:
        self.loads.end(error)
        self.cache.end(error)
