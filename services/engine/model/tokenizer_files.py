"""What turns text into tokens and back, as bytes: the router fetches it and does the text work itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from services.engine.model.errors import ModelNotFound, UnsupportedModel
from services.engine.model.json_fields import Fields, read_json, read_text

TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS_FILE = "special_tokens.json"
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A `tokenizers` file, the chat template and the special tokens that templates and detokenizers ask for."""

    tokenizer_json: bytes
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None

    def files(self) -> tuple[tuple[str, bytes], ...]:
        """(name, content) of what goes over the wire; special_tokens.json holds every field after the template."""
        special = {
            "eos_token_ids": list(self.eos_token_ids),
            "bos_token": self.bos_token,
            "bos_token_id": self.bos_token_id,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }
        files = [(TOKENIZER_FILE, self.tokenizer_json), (SPECIAL_TOKENS_FILE, json.dumps(special).encode())]
        if self.chat_template is not None:
            files.append((CHAT_TEMPLATE_FILE, self.chat_template.encode()))
        return tuple(files)

    @property
    def digest(self) -> bytes:
        """16 bytes that name exactly these files."""
        digest = blake2b(digest_size=DIGEST_BYTES)
        for name, content in self.files():
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.digest()


def load_tokenizer_files(folder: Path, eos_token_ids: tuple[int, ...]) -> TokenizerFiles:
    """Reads a transformers folder; eos_token_ids are the model's.

    Raises ModelNotFound or UnsupportedModel without a tokenizer.json, ModelCorrupt for a file that is not JSON.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UnsupportedModel(f"{folder} has a tokenizer.model but no {TOKENIZER_FILE}, which this engine needs.")
        raise ModelNotFound(f"{folder} holds no {TOKENIZER_FILE}.")
    tokenizer = Fields(read_json(path), path)
    config_path = folder / "tokenizer_config.json"
    config = Fields(read_json(config_path) if config_path.is_file() else {}, config_path)
    bos_token = _token_text(config, "bos_token")
    return TokenizerFiles(
        tokenizer_json=path.read_bytes(),
        chat_template=_chat_template(folder, config),
        eos_token_ids=eos_token_ids,
        bos_token=bos_token,
        bos_token_id=None if bos_token is None else _token_id(tokenizer, bos_token),
        eos_token=_token_text(config, "eos_token"),
        unk_token=_token_text(config, "unk_token"),
        pad_token=_token_text(config, "pad_token"),
    )


def _chat_template(folder: Path, config: Fields) -> str | None:
    """A file of its own wins over tokenizer_config.json, which holds a text or a list of named ones."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return read_text(path)
    template = config.values.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in config.objects("chat_template")}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(config: Fields, name: str) -> str | None:
    """A special token is a text, or an object that holds it as `content`."""
    token = config.values.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _token_id(tokenizer: Fields, text: str) -> int | None:
    for token in tokenizer.objects("added_tokens"):
        if token.get("content") == text:
            return Fields(token, tokenizer.path).count("id", least=0)
    vocabulary = tokenizer.part("model").get("vocab")
    if not isinstance(vocabulary, dict) or text not in vocabulary:
        return None
    return Fields(vocabulary, tokenizer.path).count(text, least=0)
