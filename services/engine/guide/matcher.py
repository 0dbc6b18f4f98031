"""The state of one sequence in its guide, by the library llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from services.engine.errors import InvalidGuide
from services.engine.sampling.guide import Guide, GuideKind

# Fuel of the library, measured with hostile grammars: at most about 0.3 s for the first step, 30 ms for another.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=50_000, verbose_errors=False)
_MAX_REASON = 200  # characters
# Between the parts of JSON: enough for indented text, and an end to it, because a model may like blanks too much.
_WHITESPACE = r"\n?[ \t]{0,20}"


class GuideMatcher:
    """See GuideState. `vocab_size` is the model's, which may pad the tokenizer's."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.allowed = self._compute()

    def copy_after(self, produced: Collection[int]) -> GuideMatcher:
        """A state of its own that goes on after these tokens. Raises InvalidGuide if they do not fit."""
        matcher = self._matcher.deep_copy()
        if produced and not matcher.consume_tokens(list(produced)):
            raise InvalidGuide("The tokens that were generated already do not fit the guide.")
        return GuideMatcher(matcher, self._vocab_size)

    @property
    def is_finished(self) -> bool:
        """See GuideState."""
        return bool(self._matcher.is_stopped())

    def advance(self, token: int) -> None:
        """See GuideState."""
        self._matcher.consume_token(token)
        self.allowed = self._compute()

    def _compute(self) -> NDArray[np.uint8]:
        allowed = np.zeros((self._vocab_size + 7) // 8, dtype=np.uint8)
        if not self.is_finished:
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[: len(allowed)]
            allowed[: len(mask)] = mask
        if error := self._matcher.get_error():
            raise InvalidGuide(f"The guide cannot be followed: {_first_line(error)}")
        return allowed


def make_tokenizer(tokenizer_json: bytes, vocab_size: int, eos_token_ids: Collection[int]) -> LLTokenizer:
    """The vocabulary as the library wants it; takes a second. Raises whatever the library makes of a bad one."""
    return LLTokenizer(tokenizer_json.decode(), n_vocab=vocab_size, eos_token=list(eos_token_ids))


def make_matcher(tokenizer: LLTokenizer, guide: Guide, vocab_size: int) -> GuideMatcher:
    """The guide before its first token. Raises InvalidGuide with the library's reason."""
    try:
        matcher = LLMatcher(tokenizer, _unforced(guide.kind, _grammar(guide)), log_level=0, limits=_LIMITS)
    except ValueError as error:
        raise InvalidGuide(f"The guide is no {guide.kind.value}: {_first_line(str(error))}") from None
    if reason := matcher.get_error():
        raise InvalidGuide(f"The guide is no {guide.kind.value} that can be followed: {_first_line(reason)}")
    return GuideMatcher(matcher, vocab_size)


def _grammar(guide: Guide) -> Any:
    match guide.kind:
        case GuideKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(guide.texts[0], defaults={"whitespace_pattern": _WHITESPACE})
        case GuideKind.REGEX:
            return LLMatcher.grammar_from_regex(guide.texts[0])
        case GuideKind.CHOICE:
            # JSON strings are what the notation calls strings.
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in guide.texts))
        case GuideKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(guide.texts[0])


def _unforced(kind: GuideKind, grammar: str) -> str:
    """The same grammar as Lark, in which the library does not put the tokenizer's tokens for a text that must come.

    It would put special tokens for what spells one, and then find that these are not that text.
    """
    if kind in (GuideKind.JSON_SCHEMA, GuideKind.REGEX):
        (part,) = json.loads(grammar)["grammars"]
        grammar = part["lark_grammar"] or f"start: %json {json.dumps(part['json_schema'])}"
    return f'%llguidance {{"no_forcing": true}}\n{grammar}'


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0][:_MAX_REASON]
