"""Generated tokens on their way from the loop thread to the calls that wait for them.

Each step the loop thread hands over the outputs of all sequences at once; they are sorted into the mailboxes of
their callers. A caller is one StartGenerate, Complete or Session call. What a caller has not taken yet is merged, one
entry a sequence, so a slow reader costs no more than its own sequences' tokens and holds up nobody. Of a session it has
the answers of other verbs, too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from services.engine.core.api import (
    Cancel,
    Command,
    FinishReason,
    RequestKey,
    Reserved,
    SequenceOutput,
    StartGenerate,
)
from services.engine.errors import SequenceExists
from services.engine.front.call_log import log_end, log_failure
from services.engine.front.untaken import Untaken
from services.protocol.errors import RequestIdReused, ServiceError
from services.protocol.timing import Timing

# Entries that a caller may leave untaken before no more of its starts are read.
MAX_UNTAKEN = 1024
# Token ids and log-probabilities in one message: at about ten bytes each, a quarter of what a message may hold.
MAX_TAKEN_NUMBERS = 100_000
# What an answer takes beside its page ids, in numbers: digests, secret, names, times.
_NUMBERS_PER_ANSWER = 50
_VERB = "StartGenerate"  # as logs name it, whichever call it came by


@dataclass(frozen=True, slots=True)
class VerbAnswer:
    """What became of a PrepRecv or RemoteSend of a session."""

    request_id: str
    result: Reserved | Timing | ServiceError

    @property
    def num_numbers(self) -> int:
        """About how large it is as a message."""
        shards = self.result.address.shards if isinstance(self.result, Reserved) else ()
        return _NUMBERS_PER_ANSWER + sum(len(shard.page_ids) for shard in shards)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a caller takes at once."""

    outputs: list[SequenceOutput]
    answers: list[VerbAnswer]

    def __bool__(self) -> bool:
        return bool(self.outputs or self.answers)


class Caller:
    """One call's sequences and verbs, and what of them is ready. Made by Streams."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._entries: dict[RequestKey, Untaken] = {}
        self._refusals: list[SequenceOutput] = []
        self._answers: deque[VerbAnswer] = deque()
        self._starts_ended = False
        self._ready = asyncio.Event()
        self._taken = asyncio.Event()
        self.live: set[RequestKey] = set()
        self.num_open_verbs = 0

    def start(self, command: StartGenerate) -> None:
        """Begins a sequence. Raises SequenceExists, RequestIdReused, EngineStopped; then nothing has begun."""
        try:
            self._streams.start(command, self)
        except ServiceError as error:
            log_failure(_VERB, command.key, error)
            raise

    def cancel(self, key: RequestKey) -> None:
        """Asks for a sequence of this caller to end; its last output says when it has. Unknown ones are ignored."""
        if key in self.live:
            self._streams.cancel(key)

    def refuse(self, key: RequestKey, error: ServiceError) -> None:
        """Reports a start that was refused, apart from the output of a live sequence of the same name."""
        self._refusals.append(SequenceOutput(key, error=error))
        self._ready.set()

    def begin_verb(self) -> None:
        """A verb is under way; answer() ends it."""
        self.num_open_verbs += 1

    def answer(self, answer: VerbAnswer) -> None:
        """A verb is over."""
        self.num_open_verbs -= 1
        self._answers.append(answer)
        self._ready.set()

    def end_starts(self) -> None:
        """Nothing more will be begun: take() says so once the last sequence and verb have ended."""
        self._starts_ended = True
        self._ready.set()

    async def take(self) -> Taken:
        """What is new since the last call, at least one entry and at most what one message can carry; empty once all is
        over. Cancelling loses nothing."""
        while not self._num_untaken:
            if self._starts_ended and not self.live and not self.num_open_verbs:
                return Taken([], [])
            self._ready.clear()
            await self._ready.wait()
        taken, answers, budget = self._refusals, list[VerbAnswer](), MAX_TAKEN_NUMBERS
        self._refusals = []
        while self._answers and budget > 0:
            answers.append(self._answers.popleft())
            budget -= answers[-1].num_numbers
        while self._entries and budget > 0:
            key = next(iter(self._entries))
            entry = self._entries[key]
            budget -= entry.num_numbers
            taken.append(entry.take(key, entry.num_numbers + budget))
            if entry.is_empty:
                del self._entries[key]
        self._taken.set()
        return Taken(taken, answers)

    async def wait_for_room(self) -> None:
        """Waits while too much is untaken. Cancelling leaves nothing behind."""
        while self._num_untaken >= MAX_UNTAKEN:
            self._taken.clear()
            await self._taken.wait()

    def put(self, output: SequenceOutput) -> None:
        """Takes over new output of one of its sequences. For Streams."""
        self._entries.setdefault(output.key, Untaken()).add(output)
        self._ready.set()

    @property
    def _num_untaken(self) -> int:
        return len(self._entries) + len(self._refusals) + len(self._answers)


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
                log_end(_VERB, key, FinishReason.CANCELLED)
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
            if output.error is not None:
                self._forget(command)
                log_failure(_VERB, command.key, output.error)
            elif output.finish_reason is not None:
                self._forget(command)
                log_end(_VERB, command.key, output.finish_reason)
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


def _same_arguments(one: StartGenerate, other: StartGenerate) -> bool:
    """A retry has a call id of its own, and another deadline, because that is computed on arrival."""
    return dataclasses.replace(one, deadline=None, call_id=0) == dataclasses.replace(other, deadline=None, call_id=0)
