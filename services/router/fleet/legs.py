"""The account of a request: every verb it called, on which engine, and how long it took."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.cost.decision import Decision
from services.router.metrics import VERB_SECONDS, of
from services.router.values import Leg, Verb

MAX_NAMED = 8  # verbs in a message


class OpenLeg:
    """A verb under way. As a context it ends with the block if the block has not ended it."""

    def __init__(self, verb: Verb, engine: str, tokens: TokenRange, clock: Callable[[], float]) -> None:
        self.verb, self.engine, self._tokens = verb, engine, tokens
        self.timing: Timing | None = None  # once it has ended, if the engine gave an account
        self._clock = clock
        self._begin = clock()
        self._first_token_s: float | None = None
        self._elapsed_s: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = "OK" if kind is None else "CANCELLED"
        self.end(code=error.code.name if isinstance(error, ServiceError) else code)

    def first_token(self) -> None:
        """A token has come; only the first call counts."""
        if self._first_token_s is None:
            self._first_token_s = self._clock() - self._begin

    def end(self, timing: Timing | None = None, code: str = "OK") -> None:
        """The verb has ended, with the engine's account if it gave one; only the first call counts."""
        if self._elapsed_s is None:
            self.timing = timing
            self._elapsed_s = self._clock() - self._begin
            of(VERB_SECONDS, self.verb.value, code).observe(self._elapsed_s)

    @property
    def has_ended(self) -> bool:
        """Whether end() has been called."""
        return self._elapsed_s is not None

    def leg(self) -> Leg:
        """What is known so far."""
        elapsed_s = self._clock() - self._begin if self._elapsed_s is None else self._elapsed_s
        return Leg(self.verb, self.engine, self._tokens, self.timing, elapsed_s, self._first_token_s)


class Legs:
    """The verbs of one request in order of their beginning."""

    def __init__(self) -> None:
        self.decision: Decision | None = None  # why the request runs where it does, if its program asked
        self._open: list[OpenLeg] = []
        self._clock = asyncio.get_running_loop().time

    def begin(self, verb: Verb, engine: str, tokens: TokenRange) -> OpenLeg:
        """Opens a leg."""
        leg = OpenLeg(verb, engine, tokens, self._clock)
        self._open.append(leg)
        return leg

    def under_way(self) -> str:
        """Names of the verbs that have not ended, with their engines, of many the first; empty if there is none."""
        names = [f"{leg.verb.value} on {leg.engine}" for leg in self._open if not leg.has_ended]
        more = [f"{len(names) - MAX_NAMED} more"] if len(names) > MAX_NAMED else []
        return ", ".join(names[:MAX_NAMED] + more)

    def legs(self) -> tuple[Leg, ...]:
        """All so far."""
        return tuple(each.leg() for each in self._open)

    def generating_engine(self) -> str:
        """Name of the engine that start_generate was last called on; empty if it was not."""
        return next((leg.engine for leg in reversed(self._open) if leg.verb is Verb.START_GENERATE), "")

    def generation(self) -> Timing:
        """The account of the last start_generate that gave one; zeros if none did."""
        for leg in reversed(self._open):
            if leg.verb is Verb.START_GENERATE and leg.timing is not None:
                return leg.timing
        return Timing()
