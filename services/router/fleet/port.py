"""What the router needs of the connection to an engine, so that a simulated engine may stand at its other end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.fleet.cached_blocks import KvEvent
from services.router.fleet.info import EngineInfo, Load
from services.router.fleet.session import Sequence
from services.router.request import PolicyRequest


@dataclass(frozen=True, slots=True)
class ReservedKv:
    """A receiver's answer to prep_recv. Address and secret are passed on unread and shown to nobody."""

    reservation_id: str
    secret: bytes = field(repr=False)
    address: bytes = field(repr=False)  # types.v1.KvAddress
    window: TokenRange
    lease_s: float
    timing: Timing


class EnginePort(Protocol):
    """Errors of the engine are raised as ServiceError with the engine's own code. EngineClient is the real one."""

    async def close(self) -> None:
        """Ends every call and sequence."""

    async def prep_recv(self, call_id: str, request: PolicyRequest, end: int, max_wait_s: float) -> ReservedKv:
        """Reserves room for KV of prompt[:end]."""

    async def remote_send(
        self, call_id: str, request: PolicyRequest, tokens: TokenRange, kv: ReservedKv, attempt: int
    ) -> Timing:
        """Returns when KV of `tokens` is committed in a peer's reservation."""

    def start_generate(self, call_id: str, request: PolicyRequest, begin: int, kv: ReservedKv | None) -> Sequence:
        """Begins a sequence."""

    async def release(self, kv: ReservedKv, *, publish: bool, timeout_s: float) -> None:
        """Ends a reservation; with `publish` what was filled stays cached."""

    async def renew(self, kv: ReservedKv, *, timeout_s: float) -> float:
        """Extends a lease; returns its length from now in seconds."""

    async def abort(self, call_id: str, *, timeout_s: float) -> None:
        """Ends whatever the call of that id left on the engine."""

    async def get_info(self) -> EngineInfo:
        """What the engine says of itself."""

    def watch_health(self) -> AsyncGenerator[bool, None]:
        """Whether the engine serves: at once, then at every change."""

    def watch_load(self) -> AsyncGenerator[Load, None]:
        """Load reports as the engine sends them."""

    def watch_kv_events(self) -> AsyncGenerator[KvEvent, None]:
        """Cache events: a snapshot first."""

    def download_tokenizer(self) -> AsyncGenerator[tuple[str, bytes], None]:
        """The tokenizer's files: (name, next bytes of that file)."""
