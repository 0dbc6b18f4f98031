"""Waiting for what only shows when it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def until(look: Callable[[], Awaitable[object]], expected: object, timeout_s: float = 120.0) -> None:
    """Looks again and again until it is as expected. TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await look() == expected:
                return
            await asyncio.sleep(0.05)
