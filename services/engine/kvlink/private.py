"""`--kvtransfer none`: the pool is the engine's own, and nothing arrives or leaves."""

from __future__ import annotations

from collections.abc import Callable

from services.engine.core.api import Command, GrantDrained, GrantFailed, PushEnded
from services.engine.core.ports import GrantSpec, PushSpec
from services.engine.errors import NoKvTransfer
from services.protocol.address import KvAddress
from services.protocol.ranges import TokenRange


class PrivatePort:
    """A KvPort that answers every request by saying so. The gRPC side refuses such verbs before they get here."""

    def __init__(self) -> None:
        self._submit: Callable[[Command], None] | None = None

    def bind(self, submit: Callable[[Command], None]) -> None:
        """Says where answers go."""
        self._submit = submit

    def grant(self, spec: GrantSpec) -> None:
        """See KvPort."""
        self._answer(GrantFailed(spec.reservation_id, no_kvtransfer()))

    def revoke(self, reservation_id: str) -> None:
        """See KvPort."""
        self._answer(GrantDrained(reservation_id))

    def push(self, spec: PushSpec) -> None:
        """See KvPort."""
        self._answer(PushEnded(spec.push_id, 0, False, 0.0, no_kvtransfer()))

    def cancel_push(self, push_id: int) -> None:
        """See KvPort: every push has ended."""

    def end_attempt(self, target: KvAddress, attempt: int, attempt_range: TokenRange, writer_id: str) -> None:
        """See KvPort: there is no attempt."""

    def raise_ready(self, slot: int, layers: int) -> None:
        """See KvPort: nobody looks."""

    def _answer(self, command: Command) -> None:
        if self._submit is not None:
            self._submit(command)


def no_kvtransfer() -> NoKvTransfer:
    """The refusal of an engine with a private pool."""
    return NoKvTransfer("This engine runs without a KV transfer service: it can neither receive nor send KV.")
