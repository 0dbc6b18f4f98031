"""A request as a policy sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from services.protocol.hashes import block_hashes, hash_seed
from services.router.errors import RequestTimeout
from services.router.values import Sampling


class ModelKey(NamedTuple):
    """What engines must have in common to serve the same request: same weights, same vocabulary. A tuple, since several
    things are looked up by it for every request, and hashing a dataclass runs Python."""

    name: str
    digest: bytes
    tokenizer_digest: bytes


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """What to generate. Plain data: `dataclasses.replace` makes a variant."""

    request_id: str  # the client's name for it, or the router's
    model: ModelKey
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    cache_salt: str = ""
    deadline: float = float("inf")  # on the event loop's clock
    num_generated: int = 0  # of the prompt's last tokens, those that the client has got already
    num_told: int = 1  # of the prompt's first tokens, those whose log-probabilities it has got; the first one has none
    _hashes: dict[tuple[int, bytes], list[bytes]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def time_left_s(self) -> float:
        """Seconds until the deadline. RequestTimeout if it has passed."""
        left = self.deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise RequestTimeout("the request's time is over")
        return left

    @property
    def num_movable(self) -> int:
        """Tokens of the prompt whose KV may come from a cache or another engine: all, or those before the first one
        that has to be computed so that log-probabilities of the prompt can be told."""
        if self.sampling.prompt_logprobs is None:
            return len(self.prompt)
        num_given = len(self.prompt) - self.num_generated
        return len(self.prompt) if self.num_told >= num_given else self.num_told - 1

    def continued(self, token_ids: Sequence[int], num_told: int = 0) -> PolicyRequest:
        """The same request when the client has got these tokens, and log-probabilities of `num_told` tokens of the
        prompt, more: what comes next is what would have come without a break."""
        return replace(
            self,
            prompt=(*self.prompt, *token_ids),
            num_generated=self.num_generated + len(token_ids),
            num_told=self.num_told + num_told,
        )

    def is_hashed(self, page_size: int) -> bool:
        """Whether block_hashes has its answer at hand."""
        return (page_size, self.model.digest) in self._hashes

    def block_hashes(self, page_size: int) -> list[bytes]:
        """Names of the prompt's full blocks on engines of its model; computed once for a page size."""
        key = (page_size, self.model.digest)
        if key not in self._hashes:
            seed = hash_seed(self.model.digest, self.cache_salt)
            self._hashes[key] = block_hashes(self.prompt, page_size, seed)
        return self._hashes[key]
