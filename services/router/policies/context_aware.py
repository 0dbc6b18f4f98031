"""Disaggregated between the engines that have most of the prompt cached; no sender where little is missing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from services.router.policies import Fleet, Generation, PolicyRequest


@dataclass(frozen=True)
class Params:
    little: int = 128  # tokens that the decoding engine rather computes itself

    def __post_init__(self) -> None:
        if self.little < 0:
            raise ValueError("little is a number of tokens, at least 0")


async def policy(request: PolicyRequest, fleet: Fleet, params: Params) -> AsyncIterator[Generation]:
    prefill, decode = fleet.pair_by_prefix(request)
    end = len(request.prompt) - 1
    if end - decode.cached_prefix(request) <= params.little:
        yield decode.start_generate(request)
        return
    async with decode.prep_recv(request, end=end) as kv:
        await prefill.remote_send(request, kv)
        yield decode.start_generate(request, begin=end, kv=kv)
