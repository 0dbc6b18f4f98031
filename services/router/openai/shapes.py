"""Answers in the JSON shapes of OpenAI's API: completions and chats, whole and in pieces."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.router.openai.fields import finite
from services.router.openai.told import Told
from services.router.text.tokenizer import Tokenizer
from services.router.values import FinishReason, Logprobs, TokenLogprob, Usage

Json = dict[str, Any]
_UTF8 = codecs.getincrementaldecoder("utf-8")


class Offsets:
    """Where the tokens of a choice begin in its text, in characters; one that begins inside a character: where that
    does. Not where the text is cut into pieces, since text is held back for stop strings."""

    def __init__(self) -> None:
        self._decoder = _UTF8(errors="replace")
        self._num_characters = 0

    def next(self, added: bytes) -> int:
        """Of the next token, which adds these bytes to the text."""
        begin = self._num_characters
        self._num_characters += len(self._decoder.decode(added))
        return begin


@dataclass(slots=True)
class Choice:
    """One answer as far as it has come, or a piece of it; `told`: its prompt, if something is to be said of that."""

    text: str = ""
    told: Told | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a caller wants to be told: `logprobs` alternatives of new tokens and, with `echo`, of the prompt's;
    `prompt_logprobs` alternatives of the prompt's by themselves. None: nothing."""

    logprobs: int | None = None
    echo: bool = False
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What completions and chats have in common."""

    request_id: str
    model: str
    fingerprint: str
    tokenizer: Tokenizer
    wishes: Wishes
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

    def _prompt(self, told: Told | None) -> Json:
        """The member that tells the prompt; empty if it was not asked for."""
        num_top = self.wishes.prompt_logprobs
        return {} if told is None or num_top is None else {"prompt_logprobs": told.by_id(num_top, self._name)}

    def _name(self, token_id: int) -> str:
        """The token's text; of one that is no text by itself, its bytes as OpenAI writes them."""
        spelled = self.tokenizer.spell(token_id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


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
        answer = self._envelope("chat.completion", "chatcmpl", shown) | {"usage": usage(choices, num_asks)}
        return answer | self._prompt(choices[0].told)

    def opening(self, index: int) -> Json | None:
        """The piece that begins a choice."""
        return self._piece(index, {"role": "assistant", "content": ""}, (), None)

    def piece(self, index: int, part: Choice, offsets: Offsets) -> Json:
        """New text and tokens of a choice; `offsets`: of this choice."""
        delta = {"content": part.text} if part.text or part.finish is None else {}
        return self._piece(index, delta, part.logprobs, part.finish)

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
        if self.wishes.logprobs is None:
            return None
        content = [
            self._token(each.chosen) | {"top_logprobs": [self._token(other) for other in each.top]} for each in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenLogprob) -> Json:
        spelled = self.tokenizer.spell(token.token_id)
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
        shown = [self._choice(index, choice, Offsets()) for index, choice in enumerate(choices)]
        return self._envelope("text_completion", "cmpl", shown) | {"usage": usage(choices, num_asks)}

    def opening(self, index: int) -> Json | None:
        """A completion begins with its text."""
        return None

    def piece(self, index: int, part: Choice, offsets: Offsets) -> Json:
        """New text and tokens of a choice; `offsets`: of this choice."""
        return self._envelope("text_completion", "cmpl", [self._choice(index, part, offsets)])

    def closing(self, choices: Sequence[Choice], num_asks: int) -> Json:
        """The piece that tells the usage."""
        return self._envelope("text_completion", "cmpl", []) | {"usage": usage(choices, num_asks)}

    def _choice(self, index: int, part: Choice, offsets: Offsets) -> Json:
        wishes = self.wishes
        return {
            "index": index,
            "text": part.text,
            "logprobs": None if wishes.logprobs is None else self._logprobs(part, offsets, wishes.logprobs),
            "finish_reason": finish_reason(part.finish),
        } | self._prompt(part.told)

    def _logprobs(self, part: Choice, offsets: Offsets, num_top: int) -> Json:
        """Of new tokens, and before them of those of an echoed prompt."""
        shown = self._echoed(part.told, offsets, num_top) if part.told is not None and self.wishes.echo else _nothing()
        for each in part.logprobs:
            token_id = each.chosen.token_id
            shown["tokens"].append(self._name(token_id))
            shown["token_logprobs"].append(finite(each.chosen.logprob))
            shown["top_logprobs"].append(self._tops((other.token_id, other.logprob) for other in each.top))
            shown["text_offset"].append(offsets.next(self.tokenizer.adds(token_id)))
        return shown

    def _echoed(self, told: Told, offsets: Offsets, num_top: int) -> Json:
        """Nothing is said of the first token but that it is there."""
        rated = told.rated(num_top)
        return {
            "tokens": [self._name(token_id) for token_id in told.token_ids],
            "token_logprobs": [None, *(logprob for logprob, _ in rated)],
            "top_logprobs": [None, *(self._tops(tops) for _, tops in rated)],
            "text_offset": [offsets.next(piece) for piece in self.tokenizer.pieces(told.token_ids)],
        }

    def _tops(self, tops: Iterable[tuple[int, float]]) -> Json:
        """By name, the best first; of tokens that are spelled alike the best one."""
        named: Json = {}
        for token_id, logprob in tops:
            named.setdefault(self._name(token_id), finite(logprob))
        return named


def _nothing() -> Json:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


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
