"""The engine's surroundings as its loop thread sees them: who hears what it produces, and who moves its KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.engine.core.api import Load, SequenceOutput
from services.protocol.address import KvAddress
from services.protocol.ranges import TokenRange


class EngineListener(Protocol):
    """The gRPC side as the loop thread sees it."""

    def on_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        """Takes over what one step produced, at most one entry a sequence."""

    def on_load(self, load: Load) -> None:
        """Takes over the newest load; earlier ones may be forgotten."""

    def on_fatal(self, error: BaseException) -> None:
        """The loop cannot go on; every open request has been answered UNAVAILABLE."""


@dataclass(frozen=True, slots=True)
class GrantSpec:
    """A window to open in this engine's pool."""

    reservation_id: str
    secret: bytes = field(repr=False)
    window: TokenRange
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PushSpec:
    """One contiguous piece of an attempt to move. `ready_slot` is None if all layers are computed already."""

    push_id: int
    page_ids: tuple[int, ...]
    range: TokenRange
    target: KvAddress
    attempt: int
    attempt_range: TokenRange
    writer_id: str
    ready_slot: int | None


class KvPort(Protocol):
    """The KV transfer service as the loop thread sees it. Each request is answered by one command."""

    def grant(self, spec: GrantSpec) -> None:
        """Answered by GrantOpened or GrantFailed, then GrantProgress as things happen."""

    def revoke(self, reservation_id: str) -> None:
        """Answered by GrantDrained, however long it takes; also after TransferServiceLost."""

    def push(self, spec: PushSpec) -> None:
        """Answered by PushEnded."""

    def cancel_push(self, push_id: int) -> None:
        """Makes PushEnded come soon; no answer of its own."""

    def end_attempt(self, target: KvAddress, attempt: int, attempt_range: TokenRange, writer_id: str) -> None:
        """Gives up an attempt between pushes. No answer: the receiver's fencing does not depend on it."""

    def raise_ready(self, slot: int, layers: int) -> None:
        """Says through shared memory that `layers` layers are computed. Called from within a step."""
