"""Engines behind a name: every address that it resolves to, asked for again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from services.router.errors import FleetFull
from services.router.fleet.membership import Membership
from services.rpc.bind import join_address, split_address

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """IPv4 and IPv6 addresses of a name, sorted. OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(address[0]) for *_, address in found})


async def follow_dns(target: str, membership: Membership, interval_s: float, resolve: Resolve = resolve) -> None:
    """Publishes what `target`, host:port, resolves to, until cancelled. While it cannot be resolved the last answer
    stands: a name server that is away is no reason to drop engines that answer."""
    host, port = split_address(target)
    source, was_found = f"dns:{target}", True
    while True:
        try:
            async with asyncio.timeout(interval_s):
                hosts = await resolve(host, port)
            membership.publish(source, [join_address(each, port) for each in hosts])
            was_found = True
        except (OSError, TimeoutError, FleetFull) as error:
            if was_found:
                log.warning("name not resolved", extra={"fields": {"name": target, "error": str(error) or "timeout"}})
            was_found = False
        await asyncio.sleep(interval_s)
