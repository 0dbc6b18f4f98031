"""SentencePiece BPE tokenizers of GGUF files (Llama 1 and 2, Mistral): pieces with scores, bytes as fallback."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Decoder, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.normalizers import Normalizer, Prepend
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.normalizers import Sequence as Normalizers

from services.engine.model.errors import ModelCorrupt
from services.engine.model.gguf.reader import GgufFile

SPACE = "\u2581"  # stands for a space inside pieces


def sentencepiece_tokenizer(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """The tokenizer without its added tokens. Raises ModelCorrupt naming the file."""
    scores = file.numbers("tokenizer.ggml.scores")
    if len(scores) != len(tokens):
        raise ModelCorrupt(f"{file.path} has {len(scores)} scores for {len(tokens)} tokens.")
    unknown = file.special_token("unknown", tokens) or tokens[0]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = merges_by_score(tokens, scores)
    model = BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    with_prefix = file.get("tokenizer.ggml.add_space_prefix") is not False
    normalizers: list[Normalizer] = [Prepend(SPACE)] if with_prefix else []
    tokenizer.normalizer = Normalizers([*normalizers, ReplaceText(" ", SPACE)])
    decoders: list[Decoder] = [Replace(SPACE, " "), ByteFallback(), Fuse()]
    tokenizer.decoder = Sequence([*decoders, Strip(" ", 1, 0)] if with_prefix else decoders)
    return tokenizer


def merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Merges, first applied first, that build every piece as SentencePiece would.

    SentencePiece joins the neighbours whose union scores best, the leftmost of equals. Ranking every way to split a
    piece into two pieces by the piece's score does the same; ways to split one piece rank equal there, and here
    by the ids of their parts.
    """
    index = {token: position for position, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = index.get(token[:cut]), index.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-score, index[token], left, right))
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(ranked)]
