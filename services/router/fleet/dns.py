"""Engines behind a name: every address that it resolves to, asked for again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from services.router.errors import FleetFull
from services.router.fleet.membership import Membership
from services.rpc.bind import join_address, split_address

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Coroutine[Any, Any, list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """IPv4 and IPv6 addresses of a name, sorted. OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


async def follow_dns(target: str, membership: Membership, interval_s: float, resolve: Resolve = resolve) -> None:
    """Publishes what `target`, host:port, resolves to, until cancelled. While it cannot be resolved the last answer
    stands: a name server that is away is no reason to drop engines that answer."""
    host, port = split_address(target)
    source, was_found = f"dns:{target}", True
    lookup: asyncio.Task[list[str]] | None = None
    try:
        while True:
            # One that is slow is waited for: it holds a thread until it ends, and others need threads, too.
            lookup = lookup or asyncio.create_task(resolve(host, port), name=f"resolve {host}")
            await asyncio.wait({lookup}, timeout=interval_s)
            problem = "timeout"
            if lookup.done():
                problem, lookup = _publish(membership, source, lookup, port), None
            if problem and was_found:
                log.warning("name not resolved", extra={"fields": {"name": target, "error": problem}})
            was_found = not problem
            await asyncio.sleep(interval_s)
    finally:
        if lookup is not None:
            lookup.cancel()


def _publish(membership: Membership, source: str, lookup: asyncio.Task[list[str]], port: int) -> str:
    """What went wrong; empty: nothing."""
    try:
        membership.publish(source, [join_address(each, port) for each in lookup.result()])
    except (OSError, UnicodeError, FleetFull) as error:  # UnicodeError: no name that a server could be asked for
        return str(error) or type(error).__name__
    return ""
