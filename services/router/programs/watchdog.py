"""Programs that do not give the event loop back are reported and interrupted.

A program runs on the router's one event loop, so a busy loop or a blocking call in it stops every request. A thread
sees that the loop no longer beats, finds the program on the loop's stack, and sends the main thread a signal whose
handler raises inside the program: that ends Python loops as well as blocking calls, such as time.sleep. Code of the
router that a program calls is never cut off in the middle: the next looks try again. A program that swallows even that
leaves one way out: the process ends, and its supervisor starts another. The same happens where native code keeps the
interpreter, as a sum over an endless range does: then no thread of ours runs either, and it is the kernel that counts.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from services.router.metrics import BLOCKED_LOOPS
from services.router.programs.stack import OnStack, ProgramInterrupted, find, find_in

log = logging.getLogger(__name__)

BLOCK_TIMEOUT_S = 2.0
GIVE_UP_TIMEOUT_S = 30.0
SIGNAL = signal.SIGUSR2
# Ends the process. It comes when so much processor time has passed: a process that was stopped is not late.
LAST_SIGNAL, LAST_TIMER = signal.SIGPROF, signal.ITIMER_PROF


@dataclass(frozen=True, slots=True)
class WatchdogLimits:
    """How long the loop may stand still before the program on it is interrupted, and before all is given up."""

    block_s: float = BLOCK_TIMEOUT_S
    give_up_s: float = GIVE_UP_TIMEOUT_S
    ticks: int = 4  # how often it looks within block_s

    @property
    def last_s(self) -> float:
        """Processor time after which the process ends where not even a thread can end it."""
        return 2 * self.give_up_s

    @property
    def tick_s(self) -> float:
        """Between two looks. Time is counted in looks, so a process that was stopped as a whole is not late."""
        return self.block_s / self.ticks


class Watchdog:
    """Watches the loop it is started in. Interrupting needs that loop to run in the main thread, as it does in the
    router's process; elsewhere it only reports."""

    def __init__(self, limits: WatchdogLimits, on_stuck: Callable[[], None] | None = None) -> None:
        """`on_stuck` is called from the watching thread when the loop has stood still for `give_up_s`."""
        self._limits = limits
        self._on_stuck = on_stuck
        self._beats = 0
        self._timer: asyncio.TimerHandle | None = None
        self._target: int | None = None  # the run to interrupt, until that has happened
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins, from inside the loop."""
        self._loop_thread = threading.get_ident()
        self._can_interrupt = threading.current_thread() is threading.main_thread()
        if self._can_interrupt:
            signal.signal(SIGNAL, self._interrupt)
        if self._ends_process:
            faulthandler.register(LAST_SIGNAL, chain=True)  # says where, without the interpreter
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        if self._timer is not None:
            self._timer.cancel()
            if self._ends_process:
                signal.setitimer(LAST_TIMER, 0)
            self._stopped.set()
            self._thread.join()

    @property
    def _ends_process(self) -> bool:
        return self._on_stuck is not None and self._can_interrupt

    def _beat(self) -> None:
        self._beats += 1
        if self._ends_process:
            signal.setitimer(LAST_TIMER, self._limits.last_s)
        self._timer = asyncio.get_running_loop().call_later(self._limits.tick_s, self._beat)

    def _watch(self) -> None:
        beats, late, seen = 0, 0, None
        give_up = int(self._limits.give_up_s / self._limits.tick_s)
        while not self._stopped.wait(self._limits.tick_s):
            if self._beats != beats:
                beats, late, seen, self._target = self._beats, 0, None, None
                continue
            late += 1
            culprit = find_in(self._loop_thread)
            is_due = late % self._limits.ticks == 0
            if is_due:
                self._report(culprit)
            # Twice the same, lest one is blamed that has only just got its turn.
            if (is_due or self._target is not None) and culprit is not None and culprit.run == seen:
                self._target = culprit.run
                if self._can_interrupt:
                    signal.pthread_kill(self._loop_thread, SIGNAL)
            seen = None if culprit is None else culprit.run
            if late == give_up and self._on_stuck is not None:
                log.critical("the event loop stands still: giving up", extra={"fields": _fields(culprit)})
                self._on_stuck()

    def _report(self, culprit: OnStack | None) -> None:
        BLOCKED_LOOPS.labels("router" if culprit is None else culprit.name).inc()
        log.error("the event loop stands still", extra={"fields": _fields(culprit)})

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        """On the main thread, between two of its instructions: it is certain now what runs."""
        culprit = find(frame)
        if culprit is not None and culprit.run == self._target and not culprit.in_router:
            self._target = None
            raise ProgramInterrupted


def _fields(culprit: OnStack | None) -> dict[str, object]:
    return {} if culprit is None else {"policy": culprit.name, "where": culprit.where}
