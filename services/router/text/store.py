"""Tokenizers by digest: fetched from the first engine that has one, shared by all that have the same."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable

from services.router.errors import BadTokenizer
from services.router.text.tokenizer import Tokenizer, TokenizerFiles

MAX_FILES_BYTES = 128 << 20
MAX_KEPT = 8

Download = Callable[[], AsyncIterator[tuple[str, bytes]]]


class TokenizerStore:
    """Keeps the tokenizers used last; each is loaded once however many engines offer it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Tokenizer] = OrderedDict()
        self._locks: defaultdict[bytes, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def obtain(self, digest: bytes, download: Download) -> Tokenizer:
        """The tokenizer of that digest; `download` yields (file name, next bytes of it). BadTokenizer.

        Cancelling leaves nothing behind: the next caller downloads again.
        """
        async with self._locks[digest]:
            tokenizer = self._kept.get(digest)
            if tokenizer is None:
                files = TokenizerFiles.read(await _collect(download()))
                tokenizer = await asyncio.to_thread(Tokenizer, files)
            self._kept[digest] = tokenizer
            self._kept.move_to_end(digest)
            while len(self._kept) > MAX_KEPT:
                self._locks.pop(self._kept.popitem(last=False)[0], None)
            return tokenizer


async def _collect(pieces: AsyncIterator[tuple[str, bytes]]) -> dict[str, bytes]:
    files: defaultdict[str, bytearray] = defaultdict(bytearray)
    total = 0
    async for name, data in pieces:
        total += len(data)
        if total > MAX_FILES_BYTES:
            raise BadTokenizer(f"the engine's tokenizer files are larger than {MAX_FILES_BYTES} bytes")
        files[name] += data
    return {name: bytes(data) for name, data in files.items()}
