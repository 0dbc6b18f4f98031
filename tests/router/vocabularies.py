"""Small tokenizers of the two families, made with the tokenizers library itself."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "hello world, hello there", "größe naïve 你好 世界 🙂🙃"]


@cache
def byte_level(vocab_size: int = 340) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, with no token of its own before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


@cache
def sentencepiece() -> Tokenizer:
    """BPE over words marked with U+2581, bytes as a last resort, and a first token before every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["\u2581h", "ll", "\u2581w", "or", "ld"]
    merges = [("\u2581", "h"), ("l", "l"), ("\u2581", "w"), ("o", "r"), ("l", "d")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def files(tokenizer: Tokenizer, template: str | None = CHAT_TEMPLATE) -> dict[str, bytes]:
    """What an engine hands out for it."""
    special = {"eos_token_ids": [2], "bos_token_id": 1, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    handed_out = {"tokenizer.json": tokenizer.to_str().encode(), "special_tokens.json": json.dumps(special).encode()}
    if template is not None:
        handed_out["chat_template.jinja"] = template.encode()
    return handed_out
