"""Stop strings, held against a plain oracle."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.router.text.output import TextOutput
from services.router.text.stops import StopMatcher
from services.router.text.tokenizer import Tokenizer, TokenizerFiles
from services.router.values import Chunk
from tests.router.vocabularies import byte_level, files

texts = st.text("abc", max_size=12)
stops_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def oracle(text: str, stops: list[str], include_stop: bool) -> str:
    """One character at a time: the first prefix that ends in a stop string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if include_stop else text[: end - max(map(len, found))]
    return text


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(texts, max_size=8), stops=stops_lists, include_stop=st.booleans())
@example(pieces=["a", "b"], stops=["b", "ab"], include_stop=False)  # two at once: the longest
@example(pieces=["ab", "bc"], stops=["bb", "c"], include_stop=False)  # over the border, and the one that ends first
def test_the_cut_does_not_depend_on_the_pieces(pieces: list[str], stops: list[str], include_stop: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    shown = [matcher.feed(piece) for piece in pieces]
    whole = "".join(pieces)
    assert "".join(shown) + matcher.finish() == oracle(whole, stops, include_stop)
    assert matcher.stopped == any(stop in whole for stop in stops)


@settings(max_examples=100, deadline=None)
@given(text=texts, stops=stops_lists)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.stopped:
            break
        held = text[len(shown) : end]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def output(text: str, stop: str, *, include_stop: bool = False) -> tuple[TextOutput, Chunk]:
    tokenizer = Tokenizer(TokenizerFiles.read(files(byte_level())))
    chunk = Chunk(tuple(byte_level().encode(text).ids))
    return TextOutput(tokenizer.detokenizer(), [stop], include_stop=include_stop), chunk


def test_tokens_count_up_to_the_one_that_completes_the_stop_string() -> None:
    answer, chunk = output("hello world xyz and more", "d x")
    piece = answer.feed(chunk)
    assert (piece.text, answer.stopped) == ("hello worl", True)
    assert byte_level().decode(list(piece.token_ids)) == "hello world x"
    assert answer.num_tokens == len(piece.token_ids)
    assert answer.feed(chunk).token_ids == ()


def test_the_stop_string_may_be_shown() -> None:
    answer, chunk = output("hello world", "o w", include_stop=True)
    assert answer.feed(chunk).text == "hello w"


def test_what_was_held_comes_out_at_the_end() -> None:
    answer, chunk = output("hello wor", "world")
    assert answer.feed(chunk).text + answer.finish() == "hello wor"
    assert not answer.stopped


def test_a_stop_string_across_a_cut_character() -> None:
    answer, chunk = output("a🙂b", "🙂")
    pieces = [answer.feed(Chunk((token,))) for token in chunk.token_ids]
    assert "".join(piece.text for piece in pieces) == "a"
    assert answer.stopped
