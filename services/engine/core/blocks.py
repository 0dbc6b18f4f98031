"""The tokens of a sequence as a chain of named blocks, one block a page."""

from __future__ import annotations

from services.protocol.hashes import block_hashes


class BlockChain:
    """Chained hashes of the full blocks of a list of tokens that may grow; each is computed once.

    `seed` separates what must not be shared: models and cache salts (services/protocol/hashes.py).
    """

    __slots__ = ("_hashes", "page_size", "seed", "tokens")

    def __init__(self, tokens: list[int], page_size: int, seed: bytes) -> None:
        self.tokens = tokens
        self.page_size = page_size
        self.seed = seed
        self._hashes: list[bytes] = []

    def hash(self, index: int) -> bytes:
        """The name of block `index`, which must be full."""
        if index >= len(self._hashes):
            known = len(self._hashes)
            fresh = self.tokens[known * self.page_size : (index + 1) * self.page_size]
            self._hashes += block_hashes(fresh, self.page_size, self._hashes[-1] if known else self.seed)
        return self._hashes[index]

    def parent(self, index: int) -> bytes:
        """The name of what comes before block `index`: the block before it, or the seed."""
        return self.hash(index - 1) if index else self.seed

    def block(self, index: int) -> tuple[int, ...]:
        """The tokens of block `index`; fewer than a page only at the end."""
        return tuple(self.tokens[index * self.page_size : (index + 1) * self.page_size])
