"""The Sessions that are open, so many and no more: each takes memory, whether or not anything is asked on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_network
from typing import Generic, TypeVar
from urllib.parse import unquote

from services.router.errors import TooManySessions
from services.router.metrics import SESSIONS

_RETRY_S = 1.0
_IPV6_BITS = 64  # of an address: the rest its owner chooses

SessionT = TypeVar("SessionT")


class OpenSessions(Generic[SessionT]):
    """All of a router."""

    def __init__(self, *, max_sessions: int, max_client_sessions: int) -> None:
        """At most so many in all, and of one client."""
        self._max_sessions = max_sessions
        self._max_client_sessions = max_client_sessions
        self._open: set[SessionT] = set()
        self._by_client: Counter[str] = Counter()

    def __iter__(self) -> Iterator[SessionT]:
        return iter(self._open)

    @contextmanager
    def entered(self, session: SessionT, client: str) -> Iterator[None]:
        """Counts it for as long as the block runs. TooManySessions."""
        if self._by_client[client] >= self._max_client_sessions:
            raise TooManySessions(
                f"{self._max_client_sessions} sessions of this client are open, as many as one may have",
                retry_delay_s=_RETRY_S,
            )
        if len(self._open) >= self._max_sessions:
            raise TooManySessions(
                f"{self._max_sessions} sessions are open, as many as this router takes", retry_delay_s=_RETRY_S
            )
        self._open.add(session)
        self._by_client[client] += 1
        SESSIONS.inc()
        try:
            yield
        finally:
            SESSIONS.dec()
            self._open.discard(session)
            self._by_client[client] -= 1
            if not self._by_client[client]:
                del self._by_client[client]


def client_of(owner: str, peer: str) -> str:
    """Who opens a session: the tenant whose key is shown, or, where it is no tenant's, whoever calls from that host.
    `peer` as grpc names it."""
    if owner:
        return f"tenant {owner}"
    family, _, rest = peer.partition(":")
    host = unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
    if family == "ipv6":
        with suppress(ValueError):  # grpc may write what it cannot name in its own way
            address = IPv6Address(host)
            # That of an IPv4 host comes so where one socket listens for both.
            host = str(address.ipv4_mapped or ip_network((address, _IPV6_BITS), strict=False))
    return f"host {host}"
