"""What is noted of a request while it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from services.protocol.errors import ServiceError
from services.router.fleet.legs import Legs
from services.router.programs.program import BoundProgram
from services.router.traces import Trace


class Record:
    """One request from its arrival to its end, for metrics and its trace. As a context it ends with the block."""

    def __init__(self, request_id: str, time_left_s: float | None, on_end: Callable[[Record, str], None]) -> None:
        """`on_end` is told the status code's name when the block has ended."""
        self.request_id = request_id
        self.model = self.policy = "none"
        self.program: BoundProgram | None = None
        self.served_by: BoundProgram | None = None  # another one, if that could not run
        self.first_token_s: float | None = None
        self.output_tokens = 0
        self.is_answered = False  # the last piece was taken
        self.legs: Legs | None = None  # of its run, once that has begun
        self._time_left_s = time_left_s
        self._on_end = on_end
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_end(self, "OK" if error is None else self._code(error))

    def elapsed_s(self) -> float:
        """Since the request came."""
        return time.monotonic() - self._begin

    def trace(self, code: str) -> Trace:
        """What is kept of it when it has ended."""
        return Trace(
            "" if self.served_by is None else self.served_by.spec,
            () if self.legs is None else self.legs.legs(),
            code,
            self.elapsed_s(),
            self.first_token_s,
            self.output_tokens,
            None if self.legs is None else self.legs.decision,
        )

    def told(self, trace: Trace) -> dict[str, object]:
        """For the log, when it has ended."""
        return {
            "request": self.request_id,
            "model": self.model,
            "policy": trace.policy or self.policy,
            "code": trace.code,
            "output": trace.output_tokens,
            "seconds": f"{trace.duration_s:.3f}",
        }

    def _code(self, error: BaseException) -> str:
        if isinstance(error, ServiceError):
            return error.code.name
        if not isinstance(error, asyncio.CancelledError | GeneratorExit):
            return "INTERNAL"
        # A client that goes away looks like this, one whose deadline passes, and one that has its answer and does not
        # wait until all is tidied up.
        if self.is_answered:
            return "OK"
        is_late = self._time_left_s is not None and self.elapsed_s() >= self._time_left_s
        return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
