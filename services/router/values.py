"""Plain values that cross the router: what is asked of engines and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.prompt_logprobs import PromptLogprobs, joined


class Verb(Enum):
    """A sub-request call."""

    PREP_RECV = "prep_recv"
    REMOTE_SEND = "remote_send"
    START_GENERATE = "start_generate"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Guide:
    """What the output must be: a field of types.v1.Guide, and its text or, for a choice, its texts."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; types.v1.SamplingParams has the meaning and bounds of each, engines enforce them."""

    temperature: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias)
    seed: int = 0
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int = 0
    ignore_eos: bool = False
    guide: Guide | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One generated token and the best alternatives at its place."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence, before them what was asked for of its prompt. The last chunk has `finish`, and from
    an engine also `timing`."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    timing: Timing | None = None
    prompt_logprobs: PromptLogprobs | None = None  # of the next tokens of the prompt

    @property
    def weight(self) -> int:
        """About how much memory it takes, in tokens; at least 1, so that empty chunks count too."""
        weight = 1 + len(self.token_ids)
        if self.prompt_logprobs is not None:  # numbers in arrays take a tenth of the memory of those in objects
            weight += self.prompt_logprobs.num_numbers // 10
        return weight + sum(1 + len(each.top) for each in self.logprobs) if self.logprobs else weight


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk that says what at least one chunk said, in order."""
    if len(chunks) == 1:
        return chunks[0]
    return Chunk(
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(each for chunk in chunks for each in chunk.logprobs),
        finish=chunks[-1].finish,
        timing=chunks[-1].timing,
        prompt_logprobs=joined([chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None]),
    )


@dataclass(frozen=True, slots=True)
class Leg:
    """One verb of a request as the router saw it; `timing` is None if the engine gave no account."""

    verb: Verb
    engine: str
    range: TokenRange
    timing: Timing | None
    elapsed_s: float
    first_token_s: float | None = None  # START_GENERATE only, from the router's call


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: in the prompt, of these cached on the generating engine, and generated."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
