"""tokenizer.json and its companions from the vocabulary in a GGUF file."""

from __future__ import annotations

import json
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.gguf.byte_level import add_bos_by_default, byte_level_tokenizer
from services.engine.model.gguf.reader import GgufFile
from services.engine.model.gguf.sentencepiece import sentencepiece_tokenizer
from services.engine.model.tokenizer_files import CHAT_TEMPLATE_FILE, TOKENIZER_FILE


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """Content by file name. Raises UnsupportedModel naming the kind of tokenizer, ModelCorrupt naming the file."""
    tokens = file.texts("tokenizer.ggml.tokens")
    if len(set(tokens)) != len(tokens):
        raise ModelCorrupt(f"{file.path} lists a token twice.")
    kind = file.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = byte_level_tokenizer(file, tokens), add_bos_by_default(file)
    elif kind == "llama":
        tokenizer, adds_bos = sentencepiece_tokenizer(file, tokens), True
    else:
        raise UnsupportedModel(f"The tokenizer {kind} of {file.path.name} is not supported.")
    _mark_added_tokens(file, tokenizer, tokens)
    stated = file.get("tokenizer.ggml.add_bos_token")
    bos = file.special_token("bos", tokens)
    if bos is not None and (adds_bos if stated is None else stated):
        pair = f"{bos} $A {bos}:1 $B:1"
        tokenizer.post_processor = TemplateProcessing(f"{bos} $A", pair, [(bos, tokens.index(bos))])
    files = {TOKENIZER_FILE: tokenizer.to_str().encode(), "tokenizer_config.json": _config(file, tokens)}
    if (template := file.optional_text("tokenizer.chat_template")) is not None:
        files[CHAT_TEMPLATE_FILE] = template.encode()
    return files


def _mark_added_tokens(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Control tokens are special (hidden from decoded text); user-defined ones only match before splitting."""
    types = file.numbers("tokenizer.ggml.token_type") if file.get("tokenizer.ggml.token_type") else []
    if len(types) > len(tokens):
        raise ModelCorrupt(f"{file.path} has {len(types)} kinds of tokens for {len(tokens)} tokens.")
    unknown = file.optional_count("tokenizer.ggml.unknown_token_id")
    added = []
    for index, kind in enumerate(types):
        if kind == TokenType.CONTROL or (kind == TokenType.UNKNOWN and index == unknown):
            added.append(AddedToken(tokens[index], special=True, normalized=False))
        elif kind == TokenType.USER_DEFINED:
            added.append(AddedToken(tokens[index], special=False, normalized=False))
    tokenizer.add_tokens(added)  # at once: each call builds the search for all of them anew


def _config(file: GgufFile, tokens: list[str]) -> bytes:
    """tokenizer_config.json, by which transformers too can load the folder."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: file.special_token(name, tokens) for key, name in names.items()}
    return json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": file.count(file.own("context_length")),
            **{key: text for key, text in special.items() if text is not None},
        },
        ensure_ascii=False,
    ).encode()
