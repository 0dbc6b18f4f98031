"""What one sequence produced and its caller has not taken yet."""

from __future__ import annotations

import dataclasses

from services.engine.core.api import RequestKey, SequenceOutput, TokenLogprobs
from services.engine.sampling.prompt_logprobs import PromptLogprobs, joined


class Untaken:
    """The untaken output of one sequence. Lists, because a slow reader's entry is added to once a step."""

    __slots__ = ("_last", "_logprobs", "_prompt", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt: list[PromptLogprobs] = []  # comes before all tokens
        self._last: SequenceOutput | None = None

    def add(self, output: SequenceOutput) -> None:
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt.append(output.prompt_logprobs)
        self._last = output

    @property
    def is_empty(self) -> bool:
        """Whether all of it was taken."""
        return self._last is None

    @property
    def num_numbers(self) -> int:
        """Token ids and log-probabilities in it."""
        in_prompt = sum(len(part) * part.numbers_per_token for part in self._prompt)
        return in_prompt + len(self._token_ids) * self._numbers_per_token

    def take(self, key: RequestKey, budget: int) -> SequenceOutput:
        """As much as `budget` numbers allow, at least a token; all of it ends the sequence if the newest part does."""
        prompt, budget = self._take_prompt(budget)
        if self._prompt:
            return SequenceOutput(key, prompt_logprobs=prompt)
        count = max(1, budget // self._numbers_per_token)
        tokens, logprobs = tuple(self._token_ids[:count]), tuple(self._logprobs[:count])
        del self._token_ids[:count], self._logprobs[:count]
        if self._token_ids:
            return SequenceOutput(key, tokens, logprobs, prompt_logprobs=prompt)
        last, self._last = self._last or SequenceOutput(key), None
        return dataclasses.replace(last, token_ids=tokens, logprobs=logprobs, prompt_logprobs=prompt)

    def _take_prompt(self, budget: int) -> tuple[PromptLogprobs | None, int]:
        """Of the prompt's tokens as much as `budget` allows, at least one; and the budget that is left."""
        if not self._prompt:
            return None, budget
        whole = joined(self._prompt)
        count = min(len(whole), max(1, budget // whole.numbers_per_token))
        self._prompt = [whole.part(count, len(whole))] if count < len(whole) else []
        return whole.part(0, count), budget - count * whole.numbers_per_token

    @property
    def _numbers_per_token(self) -> int:
        return 1 + (1 + len(self._logprobs[0].top) if self._logprobs else 0)
