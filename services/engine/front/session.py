"""One Session call: starts and cancels come in while frames go out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import TypeAlias

from services.engine.core.api import RequestKey, SequenceOutput, StartGenerate
from services.engine.errors import BadRequest
from services.engine.front.streams import Caller
from services.protocol.errors import ServiceError


@dataclass(frozen=True, slots=True)
class CancelSequence:
    """The client wants a sequence of this session to end."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RefusedStart:
    """A start that was malformed."""

    request_id: str
    error: ServiceError


SessionCommand: TypeAlias = StartGenerate | CancelSequence | RefusedStart


async def converse(
    commands: AsyncIterator[SessionCommand], caller: Caller
) -> AsyncGenerator[list[SequenceOutput], None]:
    """Carries the commands out and yields what comes of them, everything there is each time.

    Ends when no more commands come and the last sequence has ended. A slow consumer gets fewer, larger lists.
    """
    reader = asyncio.create_task(_read(commands, caller))
    try:
        while outputs := await caller.take():
            yield outputs
        if reader.done():
            reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(commands: AsyncIterator[SessionCommand], caller: Caller) -> None:
    owner_id: str | None = None
    try:
        async for command in commands:
            match command:
                case StartGenerate():
                    # Sequences of a session are told apart by their request ids alone.
                    owner_id = owner_id or command.key.owner_id
                    _start(command, caller, owner_id)
                case CancelSequence(request_id) if owner_id is not None:
                    caller.cancel(RequestKey(owner_id, request_id))
                case RefusedStart(request_id, error):
                    caller.refuse(RequestKey("", request_id), error)
            await caller.wait_for_room()
    finally:
        caller.end_starts()


def _start(command: StartGenerate, caller: Caller, owner_id: str) -> None:
    try:
        if command.key.owner_id != owner_id:
            raise BadRequest(f"This session belongs to the owner {owner_id}.")
        caller.start(command)
    except ServiceError as error:
        caller.refuse(command.key, error)
