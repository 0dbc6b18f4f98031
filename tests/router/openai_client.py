"""A router over fake engines and the official client of its OpenAI-compatible door."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai

from tests.router.harness import Running, running

USER: Any = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def serving(
    num_engines: int = 1, *, key: str = "any", **options: Any
) -> AsyncIterator[tuple[Running, openai.AsyncOpenAI]]:
    """A router over fake engines, and a client of its HTTP door that tries nothing twice."""
    async with running(num_engines, http_listen="127.0.0.1:0", **options) as suite:
        base = f"http://{suite.http}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0, timeout=60) as client:
            yield suite, client
