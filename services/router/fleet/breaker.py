"""A breaker per engine: one that fails again and again is left alone for a while, then tried with one call.

The health stream tells of engines that say they are not well; this is for those that say they are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from services.protocol.errors import Code, ServiceError
from services.router.errors import BreakerOpen, EngineLost, RouterError
from services.router.metrics import BREAKER_STATE, ENGINE_FAILURES

log = logging.getLogger(__name__)

_FAULTS = frozenset({Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})
# Answers of an engine that is in order: it is leaving, its node's transfer service is gone and it can generate, or
# what it sent was altered on the way.
_NO_FAULTS = frozenset({"DRAINING", "KVTRANSFER_GONE", "NOT_DRAINED", "CHECKSUM_MISMATCH"})


class BreakerState(Enum):
    """Values as in the metric."""

    CLOSED = 0  # calls pass
    HALF_OPEN = 1  # one call may try
    OPEN = 2  # no call passes


@dataclass(frozen=True, slots=True)
class BreakerConfig:
    """Opens after so many failures in a row, for `first_s`, and after each failed trial for twice as long as before."""

    num_failures: int = 5
    first_s: float = 1.0
    longest_s: float = 30.0


def is_fault(error: ServiceError) -> bool:
    """Whether an error is the engine's own: what clients ask for wrongly, cancel, wait for too long or ask too much of
    is not."""
    if isinstance(error, RouterError):
        return isinstance(error, EngineLost)
    return error.code in _FAULTS and error.reason not in _NO_FAULTS


class BreakerCall:
    """To put around a call; its beginning may raise BreakerOpen. What that gives is to be called where success shows
    before the end; it tells of it once."""

    __slots__ = ("_breaker", "_has_told")

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._has_told = False

    def __enter__(self) -> Callable[[], None]:
        self._breaker.begin(self)
        return self._succeeded

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._breaker.failed(self, error)
        else:
            self._succeeded()

    def _succeeded(self) -> None:
        if not self._has_told:
            self._has_told = True
            self._breaker.succeeded(self)


class Breaker:
    """One engine's. All methods belong to the event loop's thread."""

    def __init__(
        self,
        engine: str,
        config: BreakerConfig,
        clock: Callable[[], float] = time.monotonic,
        on_open: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._clock = clock
        self._on_open = on_open
        self._num_failures = 0  # in a row
        self._open_s = config.first_s
        self._open_until: float | None = None  # None: closed
        self._trial: BreakerCall | None = None  # the one call that tries
        self._count_failure: Callable[[], None] | None = None  # while it is shown

    @property
    def state(self) -> BreakerState:
        """As it is now; time alone turns open into half open."""
        if self._open_until is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() < self._open_until else BreakerState.HALF_OPEN

    @property
    def admits(self) -> bool:
        """Whether a call would pass."""
        return self._open_until is None or (self._trial is None and self._clock() >= self._open_until)

    def show(self) -> None:
        """Lets /metrics read the state and count failures from now on."""
        BREAKER_STATE.labels(self._engine).set_function(lambda: self.state.value)
        self._count_failure = ENGINE_FAILURES.labels(self._engine).inc

    def hide(self) -> None:
        """Ends what `show` began."""
        BREAKER_STATE.remove(self._engine)
        ENGINE_FAILURES.remove(self._engine)
        self._count_failure = None

    def reset(self) -> None:
        """It is another engine now."""
        self._num_failures, self._open_s, self._open_until = 0, self._config.first_s, None
        self._trial = None

    def begin(self, call: BreakerCall) -> None:
        """BreakerOpen."""
        if self._open_until is None:
            return
        if not self.admits:
            raise BreakerOpen(f"engine {self._engine} failed {self._num_failures} times and is left alone")
        self._trial = call

    def succeeded(self, call: BreakerCall) -> None:
        """A call from before it opened does not count."""
        if self._open_until is None:
            self._num_failures = 0
        elif self._trial is call:
            log.info("breaker closed", extra={"fields": {"engine": self._engine}})
            self.reset()

    def failed(self, call: BreakerCall, error: BaseException) -> None:
        """It is the engine's failure, or somebody else's."""
        if isinstance(error, ServiceError) and is_fault(error):
            self._count(error)
        if self._trial is call:
            self._trial = None

    def _count(self, error: ServiceError) -> None:
        self._num_failures += 1
        if self._count_failure is not None:
            self._count_failure()
        was_open = self._open_until is not None
        if not was_open and self._num_failures < self._config.num_failures:
            return
        if was_open and self._clock() < (self._open_until or 0.0):
            return  # a call from before it opened
        self._open_until = self._clock() + self._open_s
        if self._on_open is not None:
            self._on_open()
        fields = {"engine": self._engine, "failures": self._num_failures, "for_s": self._open_s, "last": error.reason}
        log.warning("breaker opened", extra={"fields": fields})
        self._open_s = min(2 * self._open_s, self._config.longest_s)
