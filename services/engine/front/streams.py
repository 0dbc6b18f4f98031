"""Generated tokens on their way from the loop thread to the calls that wait for them.

Each step the loop thread hands over the outputs of all sequences at once; they are sorted into the mailboxes of
their callers. A caller is one StartGenerate, Complete or Session call. What a caller has not taken yet is merged, one
entry a sequence, so a slow reader costs no more than its own sequences' tokens and holds up nobody.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from services.engine.core.api import (
    Cancel,
    Command,
    RequestKey,
    SequenceOutput,
    StartGenerate,
    TokenLogprobs,
)
from services.engine.errors import SequenceExists
from services.engine.sampling.prompt_logprobs import PromptLogprobs, joined
from services.protocol.errors import RequestIdReused, ServiceError

# Entries that a caller may leave untaken before no more of its starts are read.
MAX_UNTAKEN = 1024
# Token ids and log-probabilities in one message: at about ten bytes each, a quarter of what a message may hold.
MAX_TAKEN_NUMBERS = 100_000


class Caller:
    """One call's sequences and the output they have ready. Made by Streams."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._entries: dict[RequestKey, _Entry] = {}
        self._refusals: list[SequenceOutput] = []
        self._starts_ended = False
        self._ready = asyncio.Event()
        self._taken = asyncio.Event()
        self.live: set[RequestKey] = set()

    def start(self, command: StartGenerate) -> None:
        """Begins a sequence. Raises SequenceExists, RequestIdReused, EngineStopped; then nothing has begun."""
        self._streams.start(command, self)

    def cancel(self, key: RequestKey) -> None:
        """Asks for a sequence of this caller to end; its last output says when it has. Unknown ones are ignored."""
        if key in self.live:
            self._streams.cancel(key)

    def refuse(self, key: RequestKey, error: ServiceError) -> None:
        """Reports a start that was refused, apart from the output of a live sequence of the same name."""
        self._refusals.append(SequenceOutput(key, error=error))
        self._ready.set()

    def end_starts(self) -> None:
        """No more sequences will be started: take() says so once the last one has ended."""
        self._starts_ended = True
        self._ready.set()

    async def take(self) -> list[SequenceOutput]:
        """What is new since the last call, at least one entry and at most what one message can carry; empty once all is
        over. Cancelling loses nothing."""
        while not self._entries and not self._refusals:
            if self._starts_ended and not self.live:
                return []
            self._ready.clear()
            await self._ready.wait()
        taken, budget = self._refusals, MAX_TAKEN_NUMBERS
        self._refusals = []
        while self._entries and budget > 0:
            key = next(iter(self._entries))
            entry = self._entries[key]
            budget -= entry.num_numbers
            taken.append(entry.take(key, entry.num_numbers + budget))
            if entry.is_empty:
                del self._entries[key]
        self._taken.set()
        return taken

    async def wait_for_room(self) -> None:
        """Waits while too much is untaken. Cancelling leaves nothing behind."""
        while len(self._entries) + len(self._refusals) >= MAX_UNTAKEN:
            self._taken.clear()
            await self._taken.wait()

    def put(self, output: SequenceOutput) -> None:
        """Takes over new output of one of its sequences. For Streams."""
        self._entries.setdefault(output.key, _Entry()).add(output)
        self._ready.set()


class Streams:
    """All live sequences of the engine and who listens to each. Belongs to one event loop."""

    def __init__(self, submit: Callable[[Command], None]) -> None:
        self._submit = submit
        self._call_ids = itertools.count(1)
        self._live: dict[int, tuple[StartGenerate, Caller]] = {}  # by call id
        self._by_key: dict[RequestKey, StartGenerate] = {}  # the same sequences
        self._callers: set[Caller] = set()
        self._failure: ServiceError | None = None
        self._closing = False

    @contextmanager
    def caller(self) -> Iterator[Caller]:
        """A caller, whose sequences are cancelled at the end of the block, however it ends."""
        caller = Caller(self)
        if self._closing:
            caller.end_starts()
        self._callers.add(caller)
        try:
            yield caller
        finally:
            self._callers.discard(caller)
            for key in list(caller.live):
                # Its last outputs find no listener; a new sequence of the name has another call id.
                self._forget(self._by_key[key])
                self._submit(Cancel(key))

    def start(self, command: StartGenerate, caller: Caller) -> None:
        """See Caller.start."""
        if self._failure is not None:
            raise self._failure
        # The loop thread knows this rule too, but cannot tell which of two calls of one name a Cancel is meant for.
        if (live := self._by_key.get(command.key)) is not None:
            if _same_arguments(live, command):
                raise SequenceExists(f"The sequence {command.key.request_id} is still alive.")
            raise RequestIdReused("This request id names a live sequence with other arguments.")
        command = dataclasses.replace(command, call_id=next(self._call_ids))
        self._live[command.call_id] = (command, caller)
        self._by_key[command.key] = command
        caller.live.add(command.key)
        self._submit(command)

    def cancel(self, key: RequestKey) -> None:
        """See Caller.cancel."""
        self._submit(Cancel(key))

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        """Sorts the outputs of one step into mailboxes. What has no caller any more is dropped."""
        for output in outputs:
            if (live := self._live.get(output.call_id)) is None:
                continue
            command, caller = live
            if output.finish_reason is not None or output.error is not None:
                self._forget(command)
            caller.put(output)

    def end_callers(self) -> None:
        """The engine has drained: calls that only wait for more starts end."""
        self._closing = True
        for caller in self._callers:
            caller.end_starts()

    def fail(self, error: ServiceError) -> None:
        """The loop thread is gone: what it left unanswered ends with `error`, and so does every later start."""
        self._failure = error
        self.deliver([SequenceOutput(c.key, error=error, call_id=c.call_id) for c, _ in self._live.values()])

    def _forget(self, command: StartGenerate) -> None:
        _, caller = self._live.pop(command.call_id)
        del self._by_key[command.key]
        caller.live.discard(command.key)


class _Entry:
    """The untaken output of one sequence. Lists, because a slow reader's entry is added to once a step."""

    __slots__ = ("_last", "_logprobs", "_prompt", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[PromptLogprobs] = []  # comes before all tokens
        self._last: SequenceOutput | None = None

    def add(self, output: SequenceOutput) -> None:
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt.append(output.prompt_logprobs)
        self._last = output

    @property
    def is_empty(self) -> bool:
        """Whether all of it was taken."""
        return self._last is None

    @property
    def num_numbers(self) -> int:
        """Token ids and log-probabilities in it."""
        in_prompt = sum(len(part) * part.numbers_per_token for part in self._prompt)
        return in_prompt + len(self._token_ids) * self._numbers_per_token

    def take(self, key: RequestKey, budget: int) -> SequenceOutput:
        """As much as `budget` numbers allow, at least a token; all of it ends the sequence if the newest part does."""
        prompt, budget = self._take_prompt(budget)
        if self._prompt:
            return SequenceOutput(key, prompt_logprobs=prompt)
        count = max(1, budget // self._numbers_per_token)
        tokens, logprobs = tuple(self._token_ids[:count]), tuple(self._logprobs[:count])
        del self._token_ids[:count], self._logprobs[:count]
        if self._token_ids:
            return SequenceOutput(key, tokens, logprobs, prompt_logprobs=prompt)
        last, self._last = self._last or SequenceOutput(key), None
        return dataclasses.replace(last, token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt)

    def _take_prompt(self, budget: int) -> tuple[PromptLogprobs | None, int]:
        """Of the prompt's tokens as much as `budget` allows, at least one; and the budget that is left."""
        if not self._prompt:
            return None, budget
        whole = joined(self._prompt)
        count = min(len(whole), max(1, budget // whole.numbers_per_token))
        self._prompt = [whole.part(count, len(whole))] if count < len(whole) else []
        return whole.part(0, count), budget - count * whole.numbers_per_token

    @property
    def _numbers_per_token(self) -> int:
        return 1 + (1 + len(self._logprobs[0].top) if self._logprobs else 0)


def _same_arguments(one: StartGenerate, other: StartGenerate) -> bool:
    """A retry has a call id of its own, and another deadline, because that is computed on arrival."""
    return dataclasses.replace(one, deadline=None, call_id=0) == dataclasses.replace(other, deadline=None, call_id=0)
