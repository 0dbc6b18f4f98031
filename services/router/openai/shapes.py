"""Answers in the JSON shapes of OpenAI's API: completions and chats, whole and in pieces."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.router.openai.fields import finite
from services.router.values import FinishReason, Logprobs, TokenLogprob, Usage

Json = dict[str, Any]
Spell = Callable[[int], bytes]  # a token's bytes
_UTF8 = codecs.getincrementaldecoder("utf-8")


class Offsets:
    """Where the tokens of a choice begin in its text, in characters; one that begins inside a character: where that
    does. Not where the text is cut into pieces, since text is held back for stop strings."""

    def __init__(self) -> None:
        self._decoder = _UTF8(errors="replace")
        self._num_characters = 0

    def next(self, spelled: bytes) -> int:
        """Of the next token."""
        begin = self._num_characters
        self._num_characters += len(self._decoder.decode(spelled))
        return begin


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come."""

    text: str = ""
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What completions and chats have in common. `spell` is the model's, `with_logprobs` the caller's wish."""

    request_id: str
    model: str
    fingerprint: str
    spell: Spell
    with_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def _envelope(self, kind: str, prefix: str, choices: list[Json]) -> Json:
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class ChatShape(Shape):
    """/v1/chat/completions."""

    __slots__ = ()

    def whole(self, choices: Sequence[Choice], num_asks: int) -> Json:
        """The answer in one piece."""
        shown = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": finish_reason(choice.finish),
            }
            for index, choice in enumerate(choices)
        ]
        return self._envelope("chat.completion", "chatcmpl", shown) | {"usage": usage(choices, num_asks)}

    def opening(self, index: int) -> Json | None:
        """The piece that begins a choice."""
        return self._piece(index, {"role": "assistant", "content": ""}, (), None)

    def piece(
        self, index: int, text: str, logprobs: Sequence[Logprobs], offsets: Offsets, finish: FinishReason | None
    ) -> Json:
        """New text and tokens of a choice; `offsets`: of this choice."""
        return self._piece(index, {"content": text} if text or finish is None else {}, logprobs, finish)

    def closing(self, choices: Sequence[Choice], num_asks: int) -> Json:
        """The piece that tells the usage."""
        return self._envelope("chat.completion.chunk", "chatcmpl", []) | {"usage": usage(choices, num_asks)}

    def _piece(self, index: int, delta: Json, logprobs: Sequence[Logprobs], finish: FinishReason | None) -> Json:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason(finish),
        }
        return self._envelope("chat.completion.chunk", "chatcmpl", [choice])

    def _logprobs(self, logprobs: Sequence[Logprobs]) -> Json | None:
        if not self.with_logprobs:
            return None
        content = [
            self._token(each.chosen) | {"top_logprobs": [self._token(other) for other in each.top]} for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenLogprob) -> Json:
        spelled = self.spell(token.token_id)
        return {
            "token": spelled.decode(errors="replace"),
            "logprob": finite(token.logprob),
            "bytes": list(spelled),
        }


class CompletionShape(Shape):
    """/v1/completions, whose pieces look like the whole."""

    __slots__ = ()

    def whole(self, choices: Sequence[Choice], num_asks: int) -> Json:
        """The answer in one piece."""
        shown = [
            self._choice(index, choice.text, choice.logprobs, Offsets(), choice.finish)
            for index, choice in enumerate(choices)
        ]
        return self._envelope("text_completion", "cmpl", shown) | {"usage": usage(choices, num_asks)}

    def opening(self, index: int) -> Json | None:
        """A completion begins with its text."""
        return None

    def piece(
        self, index: int, text: str, logprobs: Sequence[Logprobs], offsets: Offsets, finish: FinishReason | None
    ) -> Json:
        """New text and tokens of a choice; `offsets`: of this choice."""
        return self._envelope("text_completion", "cmpl", [self._choice(index, text, logprobs, offsets, finish)])

    def closing(self, choices: Sequence[Choice], num_asks: int) -> Json:
        """The piece that tells the usage."""
        return self._envelope("text_completion", "cmpl", []) | {"usage": usage(choices, num_asks)}

    def _choice(
        self, index: int, text: str, logprobs: Sequence[Logprobs], offsets: Offsets, finish: FinishReason | None
    ) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(logprobs, offsets) if self.with_logprobs else None,
            "finish_reason": finish_reason(finish),
        }

    def _logprobs(self, logprobs: Sequence[Logprobs], offsets: Offsets) -> Json:
        return {
            "tokens": [self._name(each.chosen.token_id) for each in logprobs],
            "token_logprobs": [finite(each.chosen.logprob) for each in logprobs],
            "top_logprobs": [
                {self._name(other.token_id): finite(other.logprob) for other in each.top} for each in logprobs
            ],
            "text_offset": [offsets.next(self.spell(each.chosen.token_id)) for each in logprobs],
        }

    def _name(self, token_id: int) -> str:
        """The token's text; of one that is no text by itself, its bytes as OpenAI writes them."""
        spelled = self.spell(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def usage(choices: Sequence[Choice], num_asks: int) -> Json:
    """Tokens of all choices; a prompt that several share counts once. `choices`: of each ask as many as of the next."""
    n = len(choices) // num_asks
    prompts = [choice.usage or Usage() for choice in choices[::n]]
    num_prompt = sum(each.prompt_tokens for each in prompts)
    num_output = sum((choice.usage or Usage()).output_tokens for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in prompts)},
    }


def finish_reason(finish: FinishReason | None) -> str | None:
    """In OpenAI's words."""
    return None if finish is None else finish.value
