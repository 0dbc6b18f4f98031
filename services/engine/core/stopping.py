"""When a sequence ends by itself."""

from __future__ import annotations

from services.engine.core.api import FinishReason
from services.engine.core.config import CoreConfig
from services.engine.core.sequence import Sequence
from services.engine.sampling.params import SamplingParams


def finish_reason(sequence: Sequence, params: SamplingParams, config: CoreConfig) -> str | None:
    """Why a sequence ends with its newest token; None if it goes on. Forced tokens end it only with the last."""
    if sequence.guide is not None and sequence.guide.is_finished:
        return FinishReason.STOP
    if not sequence.forced and _is_stop(sequence, params, config):
        return FinishReason.STOP
    return FinishReason.LENGTH if has_all(sequence, params, config) else None


def has_all(sequence: Sequence, params: SamplingParams, config: CoreConfig) -> bool:
    """Whether it has all the tokens that it may have. Tokens generated elsewhere count, unless they are forced."""
    return _is_enough(len(sequence.tokens), sequence, params, config)


def will_have_all(sequence: Sequence, config: CoreConfig) -> bool:
    """Whether it will have them with the tokens that steps under way choose. It must generate."""
    assert sequence.sampling is not None
    return _is_enough(len(sequence.tokens) + sequence.num_awaited, sequence, sequence.sampling, config)


def _is_enough(length: int, sequence: Sequence, params: SamplingParams, config: CoreConfig) -> bool:
    if sequence.forced:
        return length - sequence.num_given >= len(sequence.forced)
    is_enough = params.max_tokens is not None and length - sequence.num_prompt >= params.max_tokens
    return is_enough or length >= config.context_limit


def _is_stop(sequence: Sequence, params: SamplingParams, config: CoreConfig) -> bool:
    if len(sequence.tokens) - sequence.num_prompt < params.min_tokens:
        return False
    token = sequence.tokens[-1]
    is_end = token in config.eos_token_ids and not params.ignore_eos
    return is_end or token in params.stop_token_ids
