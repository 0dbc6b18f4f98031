"""How a request goes on after a verb has failed.

It goes on by running its program again, never by repeating single calls: what was computed or sent already is in the
engines' prefix caches, so beginning again is cheap, and programs need not know of it. What the client has got already
stands at the end of the prompt then, so the next token is the one that would have come (rule 11 of docs/design.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from services.protocol.errors import Code, ServiceError
from services.router.errors import BreakerOpen, EngineDrained, EngineLost, NoEngine, NoPair, RouterError
from services.router.fleet.backoff import Backoff, BackoffConfig
from services.router.fleet.info import EngineSnapshot
from services.router.fleet.scope import RequestScope
from services.router.metrics import RETRIES
from services.router.request import PolicyRequest
from services.router.values import Chunk

log = logging.getLogger(__name__)

_LONGEST_ADVICE_S = 5.0  # an engine may advise a longer wait; a stream that is cut off asks again sooner


class Remedy(Enum):
    """What helps against an error."""

    NONE = "none"  # the client must hear of it
    AGAIN = "again"  # the sequence from its first verb; no engine is to blame
    ELSEWHERE = "elsewhere"  # the same on engines other than the one that failed
    WITHOUT_TRANSFER = "without_transfer"  # the same with no KV moved


_BY_REASON = {
    "UNKNOWN_RESERVATION": Remedy.AGAIN,
    "STALE_EPOCH": Remedy.AGAIN,
    "STEP_FAILED": Remedy.ELSEWHERE,
    "PUSH_STALLED": Remedy.ELSEWHERE,
    "CANCELLED": Remedy.ELSEWHERE,  # with no reason of an engine's: its server cut the call off
    "KVTRANSFER_GONE": Remedy.WITHOUT_TRANSFER,
    "NO_KVTRANSFER": Remedy.WITHOUT_TRANSFER,
    "NO_TRANSPORT": Remedy.WITHOUT_TRANSFER,
    "LAYOUT_MISMATCH": Remedy.WITHOUT_TRANSFER,
    "CHECKSUM_MISMATCH": Remedy.WITHOUT_TRANSFER,  # whatever altered the bytes may do it again
    "NO_PAIR": Remedy.WITHOUT_TRANSFER,
    # An engine's: it cannot set aside what it could compute. Prompts that no engine holds the router refuses itself.
    "PROMPT_TOO_LONG": Remedy.WITHOUT_TRANSFER,
}
_BY_CODE = {
    Code.ABORTED: Remedy.AGAIN,
    Code.UNAVAILABLE: Remedy.ELSEWHERE,
    Code.RESOURCE_EXHAUSTED: Remedy.ELSEWHERE,
}

_OF_ENGINES = (BreakerOpen, EngineDrained, EngineLost, NoEngine, NoPair)


def remedy(error: ServiceError) -> Remedy:
    """By the error's reason, else by its code. Of the router's own errors only those about engines can be helped."""
    if isinstance(error, RouterError) and not isinstance(error, _OF_ENGINES):
        return Remedy.NONE
    return _BY_REASON.get(error.reason) or _BY_CODE.get(error.code, Remedy.NONE)


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """`max_retries`: failures that a request survives without getting a token further. `stranded_s`: how long one whose
    client has tokens already may wait for an engine to go on with; one without tokens is refused at once."""

    max_retries: int = 3
    stranded_s: float = 30.0
    backoff: BackoffConfig = field(default_factory=lambda: BackoffConfig(first_s=0.05, longest_s=1.0))


class Recovery:
    """One request's way through failures."""

    def __init__(
        self,
        request: PolicyRequest,
        scope: RequestScope,
        engines: Callable[[], list[EngineSnapshot]],
        limits: RetryLimits,
    ) -> None:
        self.request = request  # what to run: the prompt grows by what the client has got
        self._scope = scope
        self._engines = engines
        self._limits = limits
        self._backoff = Backoff(limits.backoff)
        self._tokens: list[int] = []  # that the client got since `request` was made
        self._num_told = 0  # tokens of the prompt whose log-probabilities it got since
        self._num_failures = 0
        self._stranded_at: float | None = None
        self._without_transfer = False

    @property
    def num_tokens(self) -> int:
        """That the client got in all."""
        return self.request.num_generated + len(self._tokens)

    def handed_on(self, chunk: Chunk) -> None:
        """The client gets what is in it, so that is never generated again."""
        self._tokens.extend(chunk.token_ids)
        if chunk.prompt_logprobs is not None:
            self._num_told += len(chunk.prompt_logprobs)

    async def after(self, error: ServiceError) -> Remedy:
        """Ends what the failed run left open, waits where that helps, and says how to run `request` now. Raises
        `error` where nothing helps or enough was tried."""
        cure = remedy(error)
        if cure is Remedy.NONE or (cure is Remedy.WITHOUT_TRANSFER and self._without_transfer):
            raise error
        self._note_progress()
        has_others = self._has_others()
        if cure is Remedy.WITHOUT_TRANSFER:
            self._without_transfer = True
        elif self._is_short_of_room(error, has_others):
            self._check_stranded(error)
        else:
            self._num_failures += 1
            if self._num_failures > self._limits.max_retries:
                raise error
        await self._scope.end_all()
        stage = "continued" if self.request.num_generated else "before_first_token"
        RETRIES.labels(stage, error.reason).inc()
        fields = {"request": self.request.request_id, "reason": error.reason, "remedy": cure.value, "stage": stage}
        log.info("request goes on after a failure", extra={"fields": fields})
        if cure is Remedy.ELSEWHERE and not has_others:
            self._scope.avoided.clear()
            await self._wait(error)
        elif cure is Remedy.AGAIN and self._num_failures > 1:
            await self._wait(error)
        return cure

    def _note_progress(self) -> None:
        if self._tokens or self._num_told:
            self.request = self.request.continued(self._tokens, self._num_told)
            self._tokens, self._num_told = [], 0
            self._num_failures, self._stranded_at = 0, None
            self._backoff.reset()

    def _has_others(self) -> bool:
        """Whether there is an engine that has not failed this request and has room for a token more."""
        engines = self._engines()
        if self.request.num_generated:
            length = len(self.request.prompt)
            self._scope.avoided.update(each.address for each in engines if each.info.max_context <= length)
        return any(each.address not in self._scope.avoided for each in engines)

    def _is_short_of_room(self, error: ServiceError, has_others: bool) -> bool:
        """Whether nothing is broken: there is only nowhere to go on now."""
        is_full = error.code is Code.RESOURCE_EXHAUSTED and (self.request.num_generated > 0 or not has_others)
        return is_full or isinstance(error, NoEngine)

    def _check_stranded(self, error: ServiceError) -> None:
        now = asyncio.get_running_loop().time()
        self._stranded_at = now if self._stranded_at is None else self._stranded_at
        if not self.request.num_generated or now - self._stranded_at >= self._limits.stranded_s:
            raise error

    async def _wait(self, error: ServiceError) -> None:
        """A growing delay, for an engine that is full at least what it advised, at most until the deadline."""
        advice_s = 0.0
        if error.code is Code.RESOURCE_EXHAUSTED and error.retry_delay_s is not None:
            advice_s = min(error.retry_delay_s, _LONGEST_ADVICE_S)
        try:
            async with asyncio.timeout(self.request.time_left_s()):
                await asyncio.gather(self._backoff.wait(), asyncio.sleep(advice_s))
        except TimeoutError:
            raise error from None
