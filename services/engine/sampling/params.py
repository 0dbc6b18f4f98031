"""How one request wants its tokens chosen; the limits are those of types.v1.SamplingParams."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.engine.sampling.guide import Guide

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0  # less would make logits infinite
MAX_PENALTY = 2.0  # of presence and frequency, either sign
MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIASES = 4096  # every step applies all of them
MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 1024
MAX_SEED = 2**64 - 1
MAX_TOKENS = 2**31 - 1


class InvalidSampling(ValueError):
    """A sampling value is out of range; `field` names it and the message is a sentence."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(sentence)
        self.field = field
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling as vLLM and OpenAI define it; the defaults decode greedily.

    The filters act on the logits in this order: logit_bias, min_tokens, penalties, guide, temperature, min_p, top_k,
    top_p.
    """

    temperature: float = 0.0  # divides the logits; 0 takes the largest
    top_p: float = 1.0  # the smallest set of best tokens whose probabilities reach this sum
    top_k: int = 0  # only the k best tokens; 0 is off
    min_p: float = 0.0  # only tokens at least min_p times as probable as the best
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens in prompt or output
    presence_penalty: float = 0.0  # subtracted once from tokens in the output
    frequency_penalty: float = 0.0  # subtracted once for each time a token stands in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int = 0
    logprobs: int | None = None  # alternatives to report; None reports nothing, 0 only the chosen token
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # no end or stop token before this many output tokens
    max_tokens: int | None = None  # None: as many as the context leaves room for
    ignore_eos: bool = False
    guide: Guide | None = None  # what the output must be
    prompt_logprobs: int | None = None  # alternatives to report for each token of the prompt; None reports nothing

    @staticmethod
    def bias_pairs(bias: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
        """`bias` as the hashable, ordered form that logit_bias takes."""
        return tuple(sorted(bias.items()))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def changes_logits(self, output_length: int) -> bool:
        """Whether logits are changed, after so many output tokens, before one is chosen by them."""
        return bool(self.logit_bias) or self.has_penalties or output_length < self.min_tokens

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidSampling for the first value that is out of range, of the wrong type, or not a number."""
        _check_float("temperature", self.temperature, 0, MAX_TEMPERATURE)
        _check_float("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise InvalidSampling("top_p", "top_p must be above 0.")
        _check_int("top_k", self.top_k, 0, MAX_TOKENS)
        _check_float("min_p", self.min_p, 0, 1)
        _check_float("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        _check_float("presence_penalty", self.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
        _check_float("frequency_penalty", self.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidSampling("logit_bias", f"logit_bias may name at most {MAX_LOGIT_BIASES} tokens.")
        for token_id, bias in self.logit_bias:
            _check_token("logit_bias", token_id, vocab_size)
            _check_float("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if len({token_id for token_id, _ in self.logit_bias}) != len(self.logit_bias):
            raise InvalidSampling("logit_bias", "logit_bias names a token twice.")
        _check_int("seed", self.seed, 0, MAX_SEED)
        for field, wanted in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if wanted is not None:
                _check_int(field, wanted, 0, min(MAX_TOP_LOGPROBS, vocab_size))
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidSampling("stop_token_ids", f"At most {MAX_STOP_TOKENS} stop_token_ids may be given.")
        for token_id in self.stop_token_ids:
            _check_token("stop_token_ids", token_id, vocab_size)
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
            if self.min_tokens > self.max_tokens:
                raise InvalidSampling("min_tokens", f"min_tokens must not exceed max_tokens, {self.max_tokens}.")
        if self.guide is not None and (problem := self.guide.problem()) is not None:
            raise InvalidSampling("guide", problem)


def _check_float(field: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise InvalidSampling(field, f"{field} must be a number from {low:g} to {high:g}, not {value!r}.")


def _check_token(field: str, token_id: Any, vocab_size: int) -> None:
    if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
        raise InvalidSampling(
            field, f"{field} names {token_id!r}, but token ids are integers from 0 to {vocab_size - 1}."
        )


def _check_int(field: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSampling(field, f"{field} must be an integer from {low} to {high}, not {value!r}.")
