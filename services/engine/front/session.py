"""One Session call: starts, other verbs and cancels come in while frames go out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

from services.engine.core.api import RequestKey, StartGenerate
from services.engine.errors import BadRequest
from services.engine.front.session_verbs import SessionVerbs, VerbCall
from services.engine.front.streams import Caller, Taken
from services.protocol.errors import ServiceError


@dataclass(frozen=True, slots=True)
class CancelCall:
    """The client wants a sequence or a verb of this session to end."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RefusedStart:
    """A start that was malformed. The name is not longer than a valid one."""

    request_id: str
    error: ServiceError


@dataclass(frozen=True, slots=True)
class RefusedVerb:
    """A PrepRecv or RemoteSend of a malformed name, cut to the length of a valid one."""

    request_id: str
    method: str
    error: ServiceError


SessionCommand: TypeAlias = StartGenerate | VerbCall | CancelCall | RefusedStart | RefusedVerb


async def converse(commands: AsyncIterator[SessionCommand], caller: Caller) -> AsyncGenerator[Taken, None]:
    """Carries the commands out and yields what comes of them, everything there is each time.

    Ends when no more commands come and the last call has ended. A slow consumer gets fewer, larger portions.
    """
    verbs = SessionVerbs(caller)
    reader = asyncio.create_task(_Reader(caller, verbs).read(commands))
    try:
        while taken := await caller.take():
            yield taken
        if reader.done():
            reader.result()
    finally:
        # All of it before anything is awaited: another cancellation may end the wait.
        reader.cancel()
        verbs.cancel_all()
        await asyncio.gather(reader, verbs.ended(), return_exceptions=True)


class _Reader:
    """Carries out commands in order; none of them makes the next one wait."""

    def __init__(self, caller: Caller, verbs: SessionVerbs) -> None:
        self._caller = caller
        self._verbs = verbs
        self._owner_id: str | None = None

    async def read(self, commands: AsyncIterator[SessionCommand]) -> None:
        try:
            async for command in commands:
                self._carry_out(command)
                await self._caller.wait_for_room()
        finally:
            self._caller.end_starts()

    def _carry_out(self, command: SessionCommand) -> None:
        match command:
            case StartGenerate():
                self._start(command)
            case VerbCall(key) if self._is_ours(key):
                self._verbs.begin(command)
            case VerbCall(key, method):
                self._verbs.refuse(key.request_id, method, self._wrong_owner())
            case CancelCall(request_id) if self._owner_id is not None:
                self._caller.cancel(RequestKey(self._owner_id, request_id))
                self._verbs.cancel(request_id)
            case RefusedStart(request_id, error):
                self._caller.refuse(RequestKey("", request_id), error)
            case RefusedVerb(request_id, method, error):
                self._verbs.refuse(request_id, method, error)

    def _start(self, command: StartGenerate) -> None:
        try:
            if not self._is_ours(command.key):
                raise self._wrong_owner()
            self._caller.start(command)
        except ServiceError as error:
            self._caller.refuse(command.key, error)

    def _is_ours(self, key: RequestKey) -> bool:
        """Calls of a session are told apart by their request ids alone, so they must be of one owner: the first."""
        self._owner_id = self._owner_id or key.owner_id
        return key.owner_id == self._owner_id

    def _wrong_owner(self) -> BadRequest:
        return BadRequest(f"This session belongs to the owner {self._owner_id}.")
