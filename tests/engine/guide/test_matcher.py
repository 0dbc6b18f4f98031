"""What a guide allows is exactly its language, from any point of it; nonsense is refused in one sentence."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from llguidance import LLTokenizer
from tokenizers import Tokenizer

from services.engine.errors import InvalidGuide
from services.engine.guide.matcher import GuideMatcher, make_matcher, make_tokenizer
from services.engine.sampling.guide import MAX_GUIDE_BYTES, Guide
from tests.engine.guide.guides import END, VOCAB, choice, grammar, json_schema, regex
from tests.models import make_tiny_llama

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARITHMETIC = 'start: term (/[+*]/ term){0,3}\nterm: /[0-9]{1,2}/ | "(" start ")"'


def _is_person(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"name", "age"} and len(value["name"]) <= 5 and 0 <= value["age"] <= 99


LANGUAGES: dict[str, tuple[Guide, Callable[[str], object]]] = {
    "json": (json_schema(json.dumps(PERSON)), _is_person),
    "json array": (json_schema('{"type": "array", "items": {"enum": ["a", "b", 3]}, "maxItems": 4}'), json.loads),
    "regex": (regex(r"(ab|cd)+[0-9]{2,4}\.?"), re.compile(r"(ab|cd)+[0-9]{2,4}\.?").fullmatch),
    "unicode regex": (regex("[äöü€]{3}"), re.compile("[äöü€]{3}").fullmatch),
    "choice": (choice("yes", 'no "way"', "näh\n"), {"yes", 'no "way"', "näh\n"}.__contains__),
    "grammar": (grammar(ARITHMETIC), re.compile(r"[0-9+*()]+").fullmatch),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> LLTokenizer:
    return make_tokenizer((folder / "tokenizer.json").read_bytes(), VOCAB, (END,))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def allowed_tokens(matcher: GuideMatcher) -> list[int]:
    return np.flatnonzero(np.unpackbits(matcher.allowed, count=VOCAB, bitorder="little")).tolist()


def test_blanks_in_json_come_to_an_end(vocabulary: LLTokenizer, tokenizer: Tokenizer) -> None:
    matcher = make_matcher(vocabulary, json_schema("{}"), VOCAB)
    blank = tokenizer.token_to_id("Ġ")
    for token in tokenizer.encode("[1,").ids:
        matcher.advance(token)
    num_blanks = 0
    while blank in allowed_tokens(matcher):
        matcher.advance(blank)
        num_blanks += 1
        assert num_blanks < 30
    assert num_blanks > 0
    assert tokenizer.token_to_id("2") in allowed_tokens(matcher)


def walk(matcher: GuideMatcher, choose: random.Random, most: int = 200) -> list[int]:
    """Random allowed tokens until nothing may follow, the end token included if it was taken."""
    tokens: list[int] = []
    while not matcher.is_finished:
        assert len(tokens) < most
        options = allowed_tokens(matcher)
        assert options
        tokens.append(END if END in options and choose.random() < 0.5 else choose.choice(options))
        matcher.advance(tokens[-1])
    return tokens


@pytest.mark.parametrize("name", LANGUAGES)
def test_whatever_is_chosen_is_in_the_language(vocabulary: LLTokenizer, tokenizer: Tokenizer, name: str) -> None:
    guide, is_in = LANGUAGES[name]
    choose = random.Random(0)
    seen = set()
    for _ in range(20):
        tokens = walk(make_matcher(vocabulary, guide, VOCAB), choose)
        text = tokenizer.decode(tokens)
        assert is_in(text) not in (None, False), text
        seen.add(text)
    assert len(seen) > 2


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (choice("a<|im_end|>b"), "a<|im_end|>b"),
        (json_schema('{"enum": ["a<|im_end|>b"]}'), '"a<|im_end|>b"'),
        (regex(r"a<\|im_end\|>b"), "a<|im_end|>b"),
        (grammar('start: "a<|im_end|>" "b"'), "a<|im_end|>b"),
        # The same, spelled so that no reading of the guide's own text finds it.
        (json_schema('{"enum": ["a\\u003c|im_end|\\u003eb"]}'), '"a<|im_end|>b"'),
        (regex(r"a[<]\|im_end[|]>b"), "a<|im_end|>b"),
        (regex(r"a\x3c\|im_end\|>b"), "a<|im_end|>b"),
        (grammar('start: "a<|im" "_end|>" "b"'), "a<|im_end|>b"),
    ],
)
def test_text_that_spells_a_special_token_is_text(
    vocabulary: LLTokenizer, tokenizer: Tokenizer, guide: Guide, expected: str
) -> None:
    matcher = make_matcher(vocabulary, guide, VOCAB)
    *tokens, last = walk(matcher, random.Random(0))
    tokens += [] if last == END else [last]
    assert END not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=False) == expected


@pytest.mark.parametrize("name", LANGUAGES)
def test_replayed_tokens_lead_to_the_same_place(vocabulary: LLTokenizer, name: str) -> None:
    guide, _ = LANGUAGES[name]
    pristine = make_matcher(vocabulary, guide, VOCAB)
    tokens = walk(pristine.copy_after(()), random.Random(1))
    stepped = pristine.copy_after(())
    for count, token in enumerate(tokens):
        replayed = pristine.copy_after(tokens[:count])
        assert np.array_equal(replayed.allowed, stepped.allowed)
        assert not replayed.is_finished
        stepped.advance(token)
    assert stepped.is_finished
    assert pristine.copy_after(tokens).is_finished


def test_the_model_may_pad_its_vocabulary(folder: Path) -> None:
    padded = make_tokenizer((folder / "tokenizer.json").read_bytes(), VOCAB + 101, (END,))
    matcher = make_matcher(padded, regex("a+"), VOCAB + 101)
    bits = np.unpackbits(matcher.allowed, count=VOCAB + 101, bitorder="little")
    assert bits[:VOCAB].any()
    assert not bits[VOCAB:].any()


def test_tokens_that_do_not_fit_are_refused(vocabulary: LLTokenizer, tokenizer: Tokenizer) -> None:
    matcher = make_matcher(vocabulary, regex("[0-9]+"), VOCAB)
    with pytest.raises(InvalidGuide, match="generated already do not fit"):
        matcher.copy_after(tokenizer.encode("12x").ids)
    assert matcher.copy_after(tokenizer.encode("12").ids).allowed.any()


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (json_schema("{"), "no json_schema"),
        (json_schema("[]"), "no json_schema"),
        (json_schema('{"type": "nope"}'), "Invalid type: nope"),
        (json_schema('{"$ref": "http://127.0.0.1:9/x"}'), "not fetch"),
        (json_schema('{"type": "object", "unheardOf": 1, "not": {}}'), "no json_schema"),
        (regex("(a"), "invalid regex"),
        (regex("a{3}(?=b)"), "no regex"),
        (grammar("start: missing"), "unknown name"),
        (grammar("begin: /a/"), "no grammar"),
        (grammar(""), "no grammar"),
    ],
)
def test_nonsense_is_refused_in_one_line(vocabulary: LLTokenizer, guide: Guide, words: str) -> None:
    with pytest.raises(InvalidGuide, match=words) as raised:
        make_matcher(vocabulary, guide, VOCAB)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def _nested(opening: str, closing: str, middle: str, size: int) -> str:
    depth = size // (len(opening) + len(closing)) - len(middle)
    return opening * depth + middle + closing * depth


HOSTILE = {
    "nested groups": regex(_nested("(", ")", "a", MAX_GUIDE_BYTES)),
    "nested rules": grammar("start: " + _nested("(", ")", '"a"', MAX_GUIDE_BYTES - 100)),
    "nested schema": json_schema(_nested('{"items":', "}", "{}", MAX_GUIDE_BYTES)),
    "nested arrays": json_schema(_nested("[", "]", "", MAX_GUIDE_BYTES)),
    "counted counts": regex("(a{1000}){1000}"),
    "many options": regex("a?" * 2000 + "a" * 2000),
    "ambiguous": grammar('start: start start | "a" | ""'),
    "endless": grammar("start: start"),
    "exponential": regex("(.*a.{60}b|.*b.{60}a)+"),
    "many properties": json_schema(
        json.dumps({"anyOf": [{"properties": {f"k{k}": {"type": "string"} for k in range(i)}} for i in range(40)]})
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_guides_are_followed_or_refused(vocabulary: LLTokenizer, name: str) -> None:
    choose = random.Random(0)
    with suppress(InvalidGuide):
        matcher = make_matcher(vocabulary, HOSTILE[name], VOCAB)
        for _ in range(30):
            if matcher.is_finished:
                break
            assert allowed_tokens(matcher)
            matcher.advance(choose.choice(allowed_tokens(matcher)))
