"""What is told to clients, whatever protocol they speak."""

from __future__ import annotations

from typing import NamedTuple

from services.router.programs.program import BoundProgram
from services.router.prompt_logprobs import PromptLogprobs
from services.router.values import FinishReason, Leg, Logprobs, Usage


class Answer(NamedTuple):
    """A piece of an answer. The first has the request's name and program, the generating engine's name and the prompt's
    token ids, and what was asked for of the prompt's tokens but the first; the last has finish, usage and legs. As
    many as tokens, so a tuple: making a frozen dataclass takes four times as long."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    legs: tuple[Leg, ...] = ()
    request_id: str = ""
    program: BoundProgram | None = None
    engine: str = ""
    prompt_ids: tuple[int, ...] = ()
    prompt_logprobs: PromptLogprobs | None = None
