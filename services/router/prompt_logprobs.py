"""How a model rates the tokens of a prompt, as arrays: a prompt has thousands. types.v1.PromptLogprobs on the wire."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Consecutive tokens of a prompt, each rated after all tokens before it: natural logarithms."""

    logprobs: array[float]
    top_count: int  # alternatives to each token
    top_ids: array[int]  # of the first token, the most probable first, then of the next one
    top_logprobs: array[float]

    def __len__(self) -> int:
        """Tokens that it tells of."""
        return len(self.logprobs)

    @property
    def num_numbers(self) -> int:
        """Token ids and log-probabilities in it."""
        return len(self.logprobs) + 2 * len(self.top_ids)

    def tops(self, num_top: int) -> list[list[tuple[int, float]]]:
        """For each token its alternatives (token id, log-probability), `num_top` at most."""
        pairs = list(zip(self.top_ids, self.top_logprobs, strict=True))
        firsts = [number * self.top_count for number in range(len(self))]
        return [pairs[first : first + min(num_top, self.top_count)] for first in firsts]

    def split(self, max_numbers: int) -> Iterator[PromptLogprobs]:
        """The same in parts of at most so many numbers, or of one token."""
        size = max(1, max_numbers // (1 + 2 * self.top_count))
        for begin in range(0, len(self), size):
            tops = slice(begin * self.top_count, (begin + size) * self.top_count)
            yield PromptLogprobs(
                self.logprobs[begin : begin + size], self.top_count, self.top_ids[tops], self.top_logprobs[tops]
            )


def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs | None:
    """The parts in order as one; None if there is none. All have as many alternatives."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return PromptLogprobs(
        array("f", chain.from_iterable(part.logprobs for part in parts)),
        parts[0].top_count,
        array("I", chain.from_iterable(part.top_ids for part in parts)),
        array("f", chain.from_iterable(part.top_logprobs for part in parts)),
    )
