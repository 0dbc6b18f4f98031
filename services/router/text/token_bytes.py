"""The bytes that each token stands for, so that text is decoded once and never re-decoded.

Both families in use spell arbitrary bytes: byte-level BPE writes every byte as one printable character of GPT-2's
table; sentencepiece writes words with U+2581 for a space, and bytes it has no piece for as tokens named <0x00> to
<0xFF>. So the text of a sequence is the UTF-8 decoding of the bytes of its tokens put together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tokenizers import Tokenizer as Backend

from services.router.errors import BadTokenizer

_SPACE_MARK = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Spelling(Enum):
    """How pieces of the vocabulary spell bytes."""

    BYTE_LEVEL = "byte_level"
    SENTENCEPIECE = "sentencepiece"


@dataclass(frozen=True, slots=True)
class DecoderKind:
    """What tokenizer.json says about decoding."""

    spelling: Spelling
    num_stripped_spaces: int = 0  # spaces that the encoder puts before the text, taken off again


def read_decoder_kind(decoder: Mapping[str, Any] | None) -> DecoderKind:
    """From the "decoder" of tokenizer.json. BadTokenizer for kinds that no causal model in use has."""
    steps = list(_steps(decoder or {}))
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return DecoderKind(Spelling.BYTE_LEVEL)
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return DecoderKind(Spelling.SENTENCEPIECE, sum(map(_stripped, steps)))
    raise BadTokenizer(f"decoder {sorted(map(str, kinds)) or 'none'} is not one this router knows")


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder.get("type") == "Sequence":
        for each in decoder.get("decoders", ()):
            yield from _steps(each)
    elif decoder:
        yield decoder


def _stripped(step: Mapping[str, Any]) -> int:
    if step["type"] == "Strip":
        return int(step.get("start", 0)) if step.get("content") == " " else 0
    return int(step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")


class TokenBytes(dict[int, bytes]):
    """Token id to bytes, of any id. Special tokens, and ids that name no token, stand for none."""

    def __init__(self, backend: Backend, spelling: Spelling) -> None:
        added = backend.get_added_tokens_decoder()
        super().__init__((token_id, b"") for token_id, token in added.items() if token.special)
        self._backend = backend
        self._spell = _byte_level if spelling is Spelling.BYTE_LEVEL else _sentencepiece

    def __missing__(self, token_id: int) -> bytes:
        # Filled as tokens are met: spelling out a whole vocabulary would take a second of the loop's time.
        piece = self._backend.id_to_token(token_id)
        known = self[token_id] = b"" if piece is None else self._spell(piece)
        return known


def _byte_characters() -> dict[str, int]:
    """GPT-2's table, inverted: printable Latin-1 characters stand for themselves, the other bytes follow at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_characters()


def _byte_level(piece: str) -> bytes:
    # An added token may hold characters outside of the table; it is then plain text.
    spelled = [_BYTES.get(character) for character in piece]
    return piece.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)


def _sentencepiece(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(match[1])
    return piece.replace(_SPACE_MARK, " ").encode()
