"""Byte-level BPE tokenizers of GGUF files: the merges are stored, how text is split first is only named."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.gguf.reader import GgufFile

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT, THREE_DIGITS = r"\p{N}", r"[0-9][0-9][0-9]"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How one family of vocabularies treats text before the merges."""

    patterns: tuple[str, ...]  # each splits what the one before left: its matches stand alone
    whole_words: bool = False  # a piece that is a token is taken whole, whatever the merges say
    adds_bos: bool = False


_SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe"), _Splitting((GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _Splitting((DIGIT, GPT2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Splitting((LLAMA3,), whole_words=True, adds_bos=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Splitting((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _Splitting((QWEN2,))),
    "tekken": _Splitting((TEKKEN,), whole_words=True, adds_bos=True),
    "default": _Splitting((PUNCTUATION, GPT2, THREE_DIGITS)),  # llama.cpp's choice for files that name none
}


def byte_level_tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """The tokenizer without its added tokens. Raises UnsupportedModel naming an unknown splitting."""
    splitting = _splitting(file)
    merges = []
    for merge in file.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    try:
        model = BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # the library raises bare Exceptions
        raise ModelCorrupt(f"{file.path}: its merges do not fit its vocabulary: {error}.") from error
    tokenizer = Tokenizer(model)
    splits = [Split(Regex(pattern), behavior="isolated") for pattern in splitting.patterns]
    tokenizer.pre_tokenizer = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def add_bos_by_default(file: GgufFile) -> bool:
    """Whether text begins with the begin token when the file does not say."""
    return _splitting(file).adds_bos


def _splitting(file: GgufFile) -> _Splitting:
    name = file.optional_text("tokenizer.ggml.pre") or "default"
    if name not in _SPLITTINGS:
        raise UnsupportedModel(f"The text splitting {name} of {file.path.name} is not supported.")
    return _SPLITTINGS[name]
