"""Running one program for one request, whatever the program does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.protocol.errors import ProtocolError, ServiceError
from services.router.eager import begin
from services.router.errors import EngineDrained, NoPair, PolicyFailed, PolicyTimeout, RequestTimeout
from services.router.fleet.generation import Generation
from services.router.fleet.legs import Legs
from services.router.fleet.mailbox import Mailbox
from services.router.fleet.recovery import Recovery, Remedy, RetryLimits
from services.router.fleet.reservation import CALL_TIMEOUT_S
from services.router.fleet.scope import RequestScope
from services.router.fleet.view import Fleet
from services.router.metrics import ABANDONED_POLICIES, FALLBACKS
from services.router.programs.catalogue import BUILT_IN
from services.router.programs.moving import moving
from services.router.programs.program import BoundProgram
from services.router.programs.stack import ProgramInterrupted, came_from_verb, failed_line
from services.router.programs.unawaited import Unawaited
from services.router.request import PolicyRequest
from services.router.values import Chunk, FinishReason, Logprobs

log = logging.getLogger(__name__)

POLICY_TIMEOUT_S = 120.0
MAX_BUFFERED_TOKENS = 1 << 16
MAX_TOKEN_ID = 2**32 - 1  # that messages have room for
# What engines answer to ranges and reservations that do not fit: clients give neither. Not that a reservation is gone:
# that is so too where its lease ran out or its engine began anew.
MISUSE = frozenset({"INVALID_RANGE", "OUTSIDE_WINDOW", "RANGE_OVERLAPS", "PROMPT_MISMATCH"})


@dataclass(frozen=True, slots=True)
class RunLimits:
    """How long a program may take: to yield again, to end after its last chunk, to end when cancelled, and to hand in
    an engine's account when a stop string has ended the answer. The client waits `client_waits_s` for the end of its
    program at most; the rest happens without it. `max_buffered` is in tokens, see Mailbox. `retries` is about verbs
    that fail."""

    between_chunks_s: float = POLICY_TIMEOUT_S
    after_last_chunk_s: float = 5.0
    after_cancel_s: float = 2.0
    after_stop_s: float = 1.0
    client_waits_s: float = 1.0
    max_buffered: int = MAX_BUFFERED_TOKENS
    retries: RetryLimits = field(default_factory=RetryLimits)

    @property
    def close_s(self) -> float:
        """How long closing may take in all before what is left is given up."""
        return self.after_last_chunk_s + self.after_cancel_s + CALL_TIMEOUT_S + 1.0


class PolicyRun:
    """A program on a task of its own, so that one that will not end can be left behind."""

    def __init__(
        self,
        program: BoundProgram,
        fallback: Callable[[], BoundProgram],
        request: PolicyRequest,
        fleet: Fleet,
        scope: RequestScope,
        recovery: Recovery,
        limits: RunLimits,
        on_end: Callable[[PolicyRun], None],
    ) -> None:
        self.served_by = program
        self._fallback = fallback
        self._request = request
        self._fleet = fleet
        self._scope = scope
        scope.calls = self._unawaited = Unawaited(program.spec)
        self._recovery = recovery
        self._limits = limits
        self._mailbox = Mailbox(limits.max_buffered)
        self._yielded = self._finished = False
        self._tidy = False  # nothing is left on engines, and nothing can be begun there
        self._closing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._yielded_at = self._loop.time()
        self._on_end = on_end
        self._task = begin(self._run(), f"policy {program.spec}")
        # After its first steps, which are to come soon.
        self._set_timer()
        self._task.add_done_callback(self._ended)

    @property
    def legs(self) -> Legs:
        """The verbs called so far."""
        return self._scope.legs

    @property
    def finished(self) -> bool:
        """Whether its last chunk has come, if not been taken."""
        return self._finished

    @property
    def num_tokens(self) -> int:
        """In all chunks that have come."""
        return self._recovery.num_tokens

    def on_end(self, call: Callable[[], None]) -> None:
        """Calls it when the program has ended and left nothing on engines, whatever has been taken of its chunks."""
        self._task.add_done_callback(lambda _: call())

    def take(self) -> Coroutine[Any, Any, Chunk | None]:
        """The next chunk; the last has `finish`, after it comes None. Raises how the program failed: an engine's
        error with its own code, PolicyFailed, PolicyTimeout, RequestTimeout, SlowConsumer."""
        return self._mailbox.take()

    def each(self, take: Callable[[Chunk], bool]) -> Coroutine[Any, Any, bool]:
        """Gives `take` each chunk in the turn of the event loop in which the program yields it, until it says False;
        True when nothing more comes. Raises as take() does, and what `take` raises."""
        return self._mailbox.each(take)

    async def stop_early(self) -> None:
        """The answer is complete although the sequence is not: ends it on its engine, and waits for the engine's
        account of it. Bounded; what goes wrong now changes the answer no more."""
        self._scope.cancel_sequences()
        try:
            async with asyncio.timeout(self._limits.after_stop_s):
                while await self._mailbox.take() is not None:
                    pass
        except (TimeoutError, ServiceError):
            log.info("no account of a stopped sequence", extra={"fields": {"request": self._request.request_id}})

    async def close(self) -> None:
        """Ends the program and all that it left on engines. Cancelling the caller does not stop it. Idempotent."""
        if self._tidy and self._task.done():
            return
        if self._closing is None:
            self._closing = self._scope.cleanup.spawn("close policy", self._close())
        await asyncio.wait({self._closing}, timeout=self._limits.client_waits_s)

    async def _close(self) -> None:
        if self._finished:
            # The client has its answer; the program may tidy up.
            await asyncio.wait({self._task}, timeout=self._limits.after_last_chunk_s)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._limits.after_cancel_s)
        if not self._task.done():
            ABANDONED_POLICIES.labels(self.served_by.name).inc()
            log.error("policy ignores its cancellation", extra={"fields": {"policy": self.served_by.spec}})
        await self._close_scope()

    async def _close_scope(self) -> None:
        left = await self._scope.close()
        self._tidy = True
        if left and self._finished:
            fields = {"policy": self.served_by.spec, "open": left, "request": self._request.request_id}
            log.warning("policy left something open", extra={"fields": fields})

    async def _run(self) -> None:
        error: ServiceError | None = None
        try:
            await self._drive()
            if not self._finished:
                what = "ended before its sequence did" if self._yielded else "yielded nothing"
                error = PolicyFailed(f"policy {self.served_by.spec} {what}{self._unawaited.remark()}")
        except BaseException as raised:  # also SystemExit: a program must not end the router
            error = self._explain(raised)
        self._mailbox.close(error)
        # At once, and not only when the client has read what there is.
        await self._close_scope()

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._timer.cancel()
        self._on_end(self)

    async def _drive(self) -> None:
        """Runs the program, and again after failures of engines, until its sequence has ended."""
        program = self.served_by
        while True:
            try:
                return await self._forward(program)
            except Exception as raised:
                error = _service_error(raised)
                if error is None or self._finished or _is_misuse(error):
                    raise
                if await self._recovery.after(error) is Remedy.WITHOUT_TRANSFER:
                    self._fall_back(error)
                program = self.served_by
                if isinstance(error, EngineDrained):
                    program = moving(program, error.address)

    def _fall_back(self, error: ServiceError) -> None:
        cause = error.cause if isinstance(error, NoPair) else error.reason
        FALLBACKS.labels(self.served_by.name, cause).inc()
        fields = {"policy": self.served_by.spec, "reason": cause, "request": self._request.request_id}
        log.warning("policy replaced by data_parallel", extra={"fields": fields})
        self.served_by = self._fallback()

    async def _forward(self, program: BoundProgram) -> None:
        async with aclosing(program.start(self._recovery.request, self._fleet)) as steps:
            failure: BaseException | None = None
            goes_on = True
            while goes_on:
                try:
                    step = await (anext(steps) if failure is None else steps.athrow(failure))
                except StopAsyncIteration:
                    return
                failure = None
                if isinstance(step, Chunk):
                    if not _makes_sense(step):
                        raise PolicyFailed(f"policy {program.spec} yielded a chunk that no engine gives")
                    if not step.token_ids:
                        await asyncio.sleep(0)  # with no end of these nobody else would ever have a turn
                    goes_on = self._hand_on(step)
                elif isinstance(step, Generation):
                    try:
                        goes_on = not self._mailbox.closed and await step.each(self._hand_on)
                    except BaseException as error:
                        failure = error  # the program's, as if it had read the chunks itself
                else:
                    raise PolicyFailed(
                        f"policy {program.spec} yielded {type(step).__name__}, neither a chunk nor a generation"
                    )

    def _hand_on(self, chunk: Chunk) -> bool:
        """To the client. False: the reader is too slow, or the program goes on after its last chunk."""
        if self._mailbox.closed:
            return False
        self._yielded, self._yielded_at = True, self._loop.time()
        self._recovery.handed_on(chunk)
        self._mailbox.put(chunk)
        if chunk.finish is not None:
            self._finished = True
            self._mailbox.close()
            return True
        return not self._mailbox.closed

    def _set_timer(self) -> None:
        # One for all chunks, which looks when it is due whether it is: chunks are many.
        due = min(self._request.deadline, self._yielded_at + self._limits.between_chunks_s)
        self._timer = self._loop.call_at(due, self._check_time)

    def _check_time(self) -> None:
        """Ends an answer that takes too long."""
        now, limit_s = self._loop.time(), self._limits.between_chunks_s
        if self._mailbox.closed:
            return
        if now >= self._request.deadline:
            self._mailbox.close(RequestTimeout("the request's time is over"))
        elif now >= self._yielded_at + limit_s:
            verbs = self.legs.under_way()
            what = f"yielded nothing for {limit_s:g} s" + (f", with {verbs} under way" if verbs else "")
            self._mailbox.close(PolicyTimeout(f"policy {self.served_by.spec} {what}{self._unawaited.remark()}"))
        else:
            self._set_timer()

    def _explain(self, raised: BaseException) -> ServiceError:
        """What the client is told; the log has the rest."""
        known = _service_error(raised)
        line = failed_line(raised, known)
        at = "" if line is None else f" at line {line}"
        if _interrupted(raised):
            return PolicyFailed(f"policy {self.served_by.spec} blocked the router{at} and was interrupted")
        if known is not None and not (_is_misuse(known) and line is not None and self._is_to_blame()):
            return known
        if not isinstance(raised, asyncio.CancelledError) or not _is_cancelled():
            fields = {"policy": self.served_by.spec, "request": self._request.request_id}
            log.error("policy failed", exc_info=raised, extra={"fields": fields})
        if known is not None and came_from_verb(known):
            what = f"called a verb{at} that was refused: {known.message} ({known.reason})"
            return PolicyFailed(f"policy {self.served_by.spec} {what}")
        return PolicyFailed(f"policy {self.served_by.spec} raised {type(known or raised).__name__}{at}")

    def _is_to_blame(self) -> bool:
        """Not for what the router's own programs do: nobody could mend them."""
        return Path(self.served_by.program.file).parent != BUILT_IN


def _is_misuse(error: ServiceError) -> bool:
    """Whether a verb was refused for what a program gave it, which no client can be blamed for. What engines answer is
    no ProtocolError here: with these the router itself refuses."""
    return error.reason in MISUSE or isinstance(error, ProtocolError)


def _makes_sense(chunk: Chunk) -> bool:
    """Whether what a program may have made itself can be part of an answer: what comes behind it relies on that."""
    return (
        isinstance(chunk.token_ids, tuple)
        and all(type(token) is int and 0 <= token <= MAX_TOKEN_ID for token in chunk.token_ids)
        and (chunk.finish is None or isinstance(chunk.finish, FinishReason))
        and all(isinstance(each, Logprobs) for each in chunk.logprobs)
    )


def _is_cancelled() -> bool:
    """Whether somebody ends the program, and it was not itself that raised."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _interrupted(raised: BaseException) -> bool:
    """Whether the watchdog ended it, in the program or in a task of its own."""
    if isinstance(raised, BaseExceptionGroup):
        return any(map(_interrupted, raised.exceptions))
    return isinstance(raised, ProgramInterrupted)


def _service_error(raised: BaseException) -> ServiceError | None:
    """The typed error in it; of a group, as task groups raise them, the first one."""
    if isinstance(raised, ServiceError):
        return raised
    if isinstance(raised, BaseExceptionGroup):
        return next(filter(None, map(_service_error, raised.exceptions)), None)
    return None
