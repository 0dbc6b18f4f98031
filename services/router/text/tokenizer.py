"""A model's tokenizer, made from the files that an engine hands out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from services.router.errors import BadTokenizer, NoChatTemplate
from services.router.text.detokenizer import Detokenizer
from services.router.text.template import ChatMessage, ChatTemplate
from services.router.text.token_bytes import TokenBytes, read_decoder_kind

Result = TypeVar("Result")

# Longer text is encoded on a thread. Of the library's calls only those for batches let go of the interpreter lock, so
# that the loop goes on.
_THREAD_CHARACTERS = 2_000
_MESSAGE_CHARACTERS = 32  # what a template adds to a message, about


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """tokenizer.json, chat_template.jinja (None: the model has none) and what special_tokens.json says."""

    tokenizer: str
    chat_template: str | None
    special_tokens: Mapping[str, str]  # variables of the template: bos_token, eos_token and the like

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> TokenizerFiles:
        """BadTokenizer if tokenizer.json is missing or a file is damaged."""
        try:
            special = json.loads(files.get("special_tokens.json", b"{}"))
            template = files.get("chat_template.jinja")
            return cls(
                files["tokenizer.json"].decode(),
                template.decode() if template else None,
                {name: token for name, token in special.items() if isinstance(token, str)},
            )
        except (KeyError, ValueError, AttributeError) as error:
            raise BadTokenizer(f"the engine's tokenizer files are incomplete or damaged: {error}") from None


class Tokenizer:
    """Encodes, decodes and renders chats. Loading a large vocabulary takes a second: construct it on a thread."""

    def __init__(self, files: TokenizerFiles) -> None:
        """BadTokenizer if the files cannot be used."""
        # Two, because whether special tokens are recognised is a property of the object and both encode at once.
        self._for_text = _load(files.tokenizer)
        self._for_text.encode_special_tokens = True
        self._for_chat = _load(files.tokenizer)
        kind = read_decoder_kind(json.loads(files.tokenizer).get("decoder"))
        self._num_stripped_spaces = kind.num_stripped_spaces
        self._bytes = TokenBytes(self._for_chat, kind.spelling)
        added = self._for_chat.get_added_tokens_decoder()
        self._special = {token_id: token.content.encode() for token_id, token in added.items() if token.special}
        self._template = ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None

    async def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, with the model's own first token; special tokens in the text are just text."""
        return await _maybe_threaded(len(text), lambda: _ids(self._for_text, text, add_special=True))

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Token ids of a conversation. NoChatTemplate, ChatTemplateFailed."""
        template = self._template
        if template is None:
            raise NoChatTemplate("the model has no chat template: send text or token ids")

        def render_and_encode() -> tuple[int, ...]:
            # The template writes the special tokens itself, the first one included.
            return _ids(self._for_chat, template.render(messages), add_special=False)

        size = sum(len(message.role) + len(message.content) + _MESSAGE_CHARACTERS for message in messages)
        return await _maybe_threaded(size, render_and_encode)

    def detokenizer(self, *, continues: bool = False) -> Detokenizer:
        """A decoder for one sequence; one that continues a text keeps its first space."""
        return Detokenizer(self._bytes, 0 if continues else self._num_stripped_spaces)

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; of a special one, its name."""
        special = self._special.get(token_id)
        return self._bytes[token_id] if special is None else special

    def adds(self, token_id: int) -> bytes:
        """The bytes that one token adds to a text which has begun; a special one adds none."""
        return self._bytes[token_id]

    def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """The bytes that each token of a whole sequence adds to what decode gives."""
        pieces, num_to_strip = [], self._num_stripped_spaces
        for token_id in token_ids:
            piece = self._bytes[token_id]
            while num_to_strip and piece.startswith(b" "):
                piece, num_to_strip = piece[1:], num_to_strip - 1
            num_to_strip = 0 if piece else num_to_strip
            pieces.append(piece)
        return pieces

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens left out."""
        decoder = self.detokenizer()
        return decoder.feed(token_ids) + decoder.finish()


def _ids(backend: Backend, text: str, *, add_special: bool) -> tuple[int, ...]:
    return tuple(backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids)


async def _maybe_threaded(num_characters: int, work: Callable[[], Result]) -> Result:
    return work() if num_characters <= _THREAD_CHARACTERS else await asyncio.to_thread(work)


def _load(text: str) -> Backend:
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise BadTokenizer(f"tokenizer.json cannot be loaded: {str(error)[:200]}") from None
    # A prompt that is too long is refused, not cut; nothing is ever padded.
    backend.no_truncation()
    backend.no_padding()
    return backend
