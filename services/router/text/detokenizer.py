"""Incremental decoding: what comes out piece by piece is, put together, what decoding all at once gives."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from services.router.text.token_bytes import TokenBytes

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Text of one sequence as its tokens arrive.

    Bytes of an unfinished character are kept back, so U+FFFD appears only where the whole text has it.
    """

    def __init__(self, table: TokenBytes, num_stripped_spaces: int = 0) -> None:
        self._table = table
        self._utf8 = _UTF8(errors="replace")
        self._to_strip = num_stripped_spaces

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete; may be empty."""
        table = self._table
        return self._strip(self._utf8.decode(b"".join([table[token_id] for token_id in token_ids])))

    def finish(self) -> str:
        """What was kept back, as U+FFFD; nothing if the last character was whole."""
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(" "):
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text
