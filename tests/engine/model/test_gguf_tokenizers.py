"""Tokenizers rebuilt from GGUF files give the ids of the original algorithms."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer

from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.gguf.reader import GgufFile
from services.engine.model.gguf.tokenizer import tokenizer_files
from tests.engine.model.gguf_files import write_vocabulary
from tests.models import byte_characters

TEXTS = [
    "Hello, we can use",
    "Hello world! 123",
    "Café déjà vu.",
    "  multiple   spaces  \n\n\ttabs\r\nand lines \n x",
    "I'm, you're, they'll DON'T 'tis",
    "price: $1,234.56 (2024-05-06) ½ ² Ⅷ ٣٤",
    "Привет, мир! Это 2-й тест.",
    "世界你好,これはテストです。안녕하세요",
    "مرحبا بالعالم שלום עולם हिन्दी ภาษาไทย",
    "🎉👩‍👩‍👧‍👦🇩🇪 emoji \u200d and e\u0301 combining",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "https://example.com/a?b=c&d=%20 user@example.org",
    "\u00a0nbsp\u2003em\u3000wide \ufeff",
    "<|im_start|>user\nHi<|im_end|>\n",
    " ",
    "",
]


# --- byte-level BPE -------------------------------------------------------------------------------------------------


class ReferenceBpe:
    """GPT-2's algorithm as published: split, map bytes to characters, join the best-ranked pair until none is left."""

    def __init__(self, tokenizer: dict, patterns: list[str]) -> None:
        model = tokenizer["model"]
        self.vocabulary = model["vocab"]
        self.special = [token["content"] for token in tokenizer["added_tokens"]]
        self.ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
        self.patterns = [regex.compile(pattern) for pattern in patterns]
        self.characters = byte_characters()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, self.special)) + ")", text):
            if piece in self.special:
                ids.append(self.vocabulary[piece])
            else:
                ids += [self.vocabulary[token] for word in self.words(piece) for token in self.join(word)]
        return ids

    def words(self, text: str) -> list[str]:
        pieces = [text] if text else []
        for pattern in self.patterns:
            split: list[str] = []
            for piece in pieces:
                end = 0
                for match in pattern.finditer(piece):
                    split += [piece[end : match.start()], match.group()]
                    end = match.end()
                split.append(piece[end:])
            pieces = [piece for piece in split if piece]
        return pieces

    def join(self, word: str) -> list[str]:
        symbols = [self.characters[byte] for byte in word.encode()]
        while len(symbols) > 1:
            pairs = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(symbols)]
            best = min(pairs)
            if best == len(self.ranks):
                break
            at = pairs.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return symbols


@pytest.fixture(scope="module")
def smollm2_json(smollm2_folder: Path) -> dict:
    return json.loads((smollm2_folder / "tokenizer.json").read_text())


@pytest.mark.slow
def test_smollm2_known_ids(smollm2_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    # Ids of the model's original tokenizer.
    known = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "\n": [198],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "<|im_start|>": [1],
    }
    for text, ids in known.items():
        assert tokenizer.encode(text).ids == ids, text


@pytest.mark.slow
def test_smollm2_equals_the_reference_algorithm(smollm2_folder: Path, smollm2_json: dict) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    gpt2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    reference = ReferenceBpe(smollm2_json, [r"\p{N}", gpt2])
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode([1, 19556, 2]) == "Hello"  # control tokens are hidden


def _toy_bpe(folder: Path, pre: str, add_bos: bool | None) -> Tokenizer:
    tokens = ["<s>", "</s>", *byte_characters(), "12", "123", "Ġa", "Ġab", "ab", "abc"]
    merges = ["1 2", "12 3", "Ġ a", "Ġa b", "a b"]  # nothing builds abc
    fields: dict = {"merges": merges, "pre": pre, "bos_token_id": 0, "eos_token_id": 1}
    if add_bos is not None:
        fields["add_bos_token"] = add_bos
    types = [3, 3] + [1] * (len(tokens) - 2)
    path = write_vocabulary(folder / f"{pre}{add_bos}.gguf", "gpt2", tokens, types, [0.0] * len(tokens), **fields)
    return Tokenizer.from_str(tokenizer_files(GgufFile(path))["tokenizer.json"].decode())


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "1234 ab", ["123", "4", "Ġab"]),
        ("smollm", "123 ab", ["1", "2", "3", "Ġab"]),
        ("qwen2", "123 ab", ["1", "2", "3", "Ġab"]),
        ("llama-bpe", "1234 ab abc", ["<s>", "123", "4", "Ġab", "Ġab", "c"]),
        ("llama-bpe", "abc", ["<s>", "abc"]),  # a word that is a token is taken whole
        ("gpt-2", "abc", ["ab", "c"]),
        ("default", "1234123", ["123", "4", "12", "3"]),  # three digits at a time: 123 412 3
        ("tekken", "123", ["<s>", "1", "2", "3"]),
    ],
)
def test_splitting(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = _toy_bpe(tmp_path, pre, None)
    assert tokenizer.encode(text).tokens == pieces


def test_begin_token_as_the_file_says(tmp_path: Path) -> None:
    assert _toy_bpe(tmp_path, "gpt-2", True).encode("ab").tokens == ["<s>", "ab"]
    assert _toy_bpe(tmp_path, "llama-bpe", False).encode("ab").tokens == ["ab"]


def test_unknown_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="text splitting martian"):
        _toy_bpe(tmp_path, "martian", None)
    path = write_vocabulary(tmp_path / "w.gguf", "bert", ["a"], [1], [0.0])
    with pytest.raises(UnsupportedModel, match="tokenizer bert"):
        tokenizer_files(GgufFile(path))


def test_vocabularies_that_make_no_sense(tmp_path: Path) -> None:
    twice = write_vocabulary(tmp_path / "twice.gguf", "gpt2", ["a", "a"], [1, 1], [0.0, 0.0])
    with pytest.raises(ModelCorrupt, match=r"twice\.gguf lists a token twice"):
        tokenizer_files(GgufFile(twice))
    merges = write_vocabulary(tmp_path / "merges.gguf", "gpt2", ["a"], [1], [0.0], merges=["a z"], pre="gpt-2")
    with pytest.raises(ModelCorrupt, match=r"merges\.gguf: its merges"):
        tokenizer_files(GgufFile(merges))
    begin = write_vocabulary(tmp_path / "begin.gguf", "llama", ["a"], [1], [0.0], bos_token_id=5)
    with pytest.raises(ModelCorrupt, match=r"begin\.gguf: the bos token 5"):
        tokenizer_files(GgufFile(begin))


# --- SentencePiece --------------------------------------------------------------------------------------------------


def _reference_sentencepiece(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: join the neighbours whose union scores best, the leftmost of equals, until none is known."""
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not joined:
            break
        at = min(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pieces: list[str] = []
    for symbol in symbols:
        pieces += [symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return pieces


def test_sentencepiece_equals_the_reference_algorithm(tmp_path: Path) -> None:
    chooser = random.Random(0)
    letters = "▁abcdé世"
    words = {"".join(chooser.choices(letters, k=chooser.randint(2, 5))) for _ in range(150)}
    # Every piece must be reachable by joins, as in a trained vocabulary: add the prefixes.
    pieces = sorted({word[:length] for word in words for length in range(2, len(word) + 1)} | set(letters))
    chooser.shuffle(pieces)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = [0.0] * 259 + [float(-rank) for rank in range(len(pieces))]
    fields = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    path = write_vocabulary(tmp_path / "spm.gguf", "llama", tokens, types, scores, **fields)
    tokenizer = Tokenizer.from_str(tokenizer_files(GgufFile(path))["tokenizer.json"].decode())
    by_piece = dict(zip(tokens[259:], scores[259:], strict=True))
    texts = ["".join(chooser.choices("abcdé世 ", k=chooser.randint(1, 30))) for _ in range(300)]
    for text in [*texts, "a🎉b", "xyz"]:
        encoded = tokenizer.encode(text)
        assert encoded.tokens == ["<s>", *_reference_sentencepiece(text, by_piece)], text
        assert tokenizer.decode(encoded.ids) == text


def test_sentencepiece_without_a_leading_space(tmp_path: Path) -> None:
    tokens, types = ["<unk>", "▁", "a"], [2, 1, 1]
    path = write_vocabulary(tmp_path / "spm.gguf", "llama", tokens, types, [0.0] * 3, add_space_prefix=False)
    tokenizer = Tokenizer.from_str(tokenizer_files(GgufFile(path))["tokenizer.json"].decode())
    assert tokenizer.encode("a a").tokens == ["a", "▁", "a"]
    assert tokenizer.decode([2, 1, 2]) == "a a"
