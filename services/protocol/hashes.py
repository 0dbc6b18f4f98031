"""Names of token blocks and digests of prompts; types.v1.BlockHash and KvAddress define them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from sys import byteorder

DIGEST_BYTES = 16


def _little_endian(tokens: Sequence[int]) -> bytes:
    words = array("I", tokens)
    if byteorder == "big":
        words.byteswap()
    return words.tobytes()


def hash_seed(model_digest: bytes, cache_salt: str) -> bytes:
    """What the first block of every prompt is chained to: tenants with other salts share nothing."""
    return blake2b(model_digest + cache_salt.encode(), digest_size=DIGEST_BYTES).digest()


def block_hashes(tokens: Sequence[int], page_size: int, seed: bytes) -> list[bytes]:
    """The chained hashes of the full blocks of `tokens`, 16 bytes each; a last partial block has none."""
    data = memoryview(_little_endian(tokens))
    block_bytes = 4 * page_size
    hashes: list[bytes] = []
    previous = seed
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        digest = blake2b(previous, digest_size=DIGEST_BYTES)
        digest.update(data[start : start + block_bytes])
        previous = digest.digest()
        hashes.append(previous)
    return hashes


def prompt_digest(tokens: Sequence[int], cache_salt: str) -> bytes:
    """Digest of a prompt (or its first tokens) under a salt, 16 bytes."""
    return blake2b(cache_salt.encode() + b"\0" + _little_endian(tokens), digest_size=DIGEST_BYTES).digest()
