"""Incremental text is the whole text, for both families of tokenizers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from services.router.errors import BadTokenizer
from services.router.text.token_bytes import read_decoder_kind
from services.router.text.tokenizer import Tokenizer, TokenizerFiles
from tests.router.vocabularies import byte_level, files, sentencepiece

BACKENDS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
OURS = {name: Tokenizer(TokenizerFiles.read(files(backend))) for name, backend in BACKENDS.items()}
FAMILIES = pytest.mark.parametrize("family", sorted(BACKENDS))

ids = st.lists(st.integers(0, 420), max_size=30)
cuts = st.lists(st.integers(1, 5), max_size=30)


@FAMILIES
@settings(max_examples=150, deadline=None)
@given(token_ids=ids, sizes=cuts)
def test_pieces_make_the_whole(family: str, token_ids: list[int], sizes: list[int]) -> None:
    tokenizer = OURS[family]
    decoder, pieces, rest = tokenizer.detokenizer(), [], list(token_ids)
    for size in sizes:
        pieces.append(decoder.feed(rest[:size]))
        rest = rest[size:]
    pieces += [decoder.feed(rest), decoder.finish()]
    whole = tokenizer.decode(token_ids)
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


@settings(max_examples=150, deadline=None)
@given(token_ids=ids)
def test_any_byte_level_tokens_decode_as_the_library_does(token_ids: list[int]) -> None:
    assert OURS["byte_level"].decode(token_ids) == BACKENDS["byte_level"].decode(token_ids)


@FAMILIES
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_text_decodes_as_the_library_does_and_never_breaks(family: str, text: str) -> None:
    token_ids = BACKENDS[family].encode(text).ids
    assert OURS[family].decode(token_ids) == BACKENDS[family].decode(token_ids)
    decoder = OURS[family].detokenizer()
    pieces = [decoder.feed([token_id]) for token_id in token_ids]
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")
    assert decoder.finish() == ""


@FAMILIES
def test_an_unfinished_character_shows_only_at_the_end(family: str) -> None:
    token_ids = BACKENDS[family].encode("🙂").ids[:-1]
    decoder = OURS[family].detokenizer()
    shown = decoder.feed(token_ids)
    assert "\ufffd" not in shown
    assert shown + decoder.finish() == OURS[family].decode(token_ids)


def test_special_tokens_have_no_text_and_added_ones_have() -> None:
    tool = BACKENDS["byte_level"].token_to_id("<tool>")
    assert OURS["byte_level"].decode([1, tool, 2]) == "<tool>"


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert OURS["byte_level"].decode([10_000]) == ""


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece"}, {"type": "Sequence", "decoders": [{"type": "CTC"}]}])
def test_decoders_of_other_kinds_are_refused(decoder: dict[str, object] | None) -> None:
    with pytest.raises(BadTokenizer):
        read_decoder_kind(decoder)


def test_metaspace_decoder_is_known() -> None:
    spelled = json.loads(BACKENDS["sentencepiece"].to_str())
    spelled["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    backend = Backend.from_str(json.dumps(spelled))
    ours = Tokenizer(TokenizerFiles.read({"tokenizer.json": json.dumps(spelled).encode()}))
    token_ids = backend.encode("hello world").ids
    assert ours.decode(token_ids) == backend.decode(token_ids) == "hello world"
