"""Incremental decoding: what comes out piece by piece is, put together, what decoding all at once gives."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable

from services.router.text.token_bytes import TokenBytes


class Detokenizer:
    """Text of one sequence as its tokens arrive.

    Bytes of an unfinished character are kept back, so U+FFFD appears only where the whole text has it.
    """

    def __init__(self, table: TokenBytes, num_stripped_spaces: int = 0) -> None:
        self._table = table
        self._unfinished = b""
        self._to_strip = num_stripped_spaces

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters that these tokens complete; may be empty."""
        spelled = self._unfinished + b"".join(map(self._table.__getitem__, token_ids))
        text, num_decoded = utf_8_decode(spelled, "replace")
        self._unfinished = spelled[num_decoded:]
        return self._strip(text) if self._to_strip else text

    def finish(self) -> str:
        """What was kept back, as U+FFFD; nothing if the last character was whole."""
        rest, self._unfinished = self._unfinished, b""
        return self._strip(rest.decode(errors="replace")) if rest else ""

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(" "):
                self._to_strip = 0
                break
            text, self._to_strip = text[1:], self._to_strip - 1
        return text
