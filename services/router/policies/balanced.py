"""Disaggregated, but the decoding engine computes the last share `ratio` of the prompt itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.router.policies import Fleet, Generation, PolicyRequest


@dataclass(frozen=True)
class Params:
    ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError("ratio is a share of the prompt, 0 to 1")


async def policy(request: PolicyRequest, fleet: Fleet, params: Params) -> AsyncIterator[Generation]:
    prefill, decode = fleet.pair(request)
    # Whole pages: a page is never filled by both.
    end = min(decode.page_floor(len(request.prompt) * (1 - params.ratio)), len(request.prompt) - 1)
    async with decode.prep_recv(request, end=end) as kv:
        await prefill.remote_send(request, kv)
        yield decode.start_generate(request, begin=end, kv=kv)
