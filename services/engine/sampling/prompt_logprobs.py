"""Log-probabilities of the tokens of a prompt, as arrays: a prompt has thousands. Pure; score.py computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Of consecutive tokens, each after all tokens before it: natural logarithms, the model's own."""

    logprobs: NDArray[np.float32]  # (tokens,)
    top_ids: NDArray[np.int32]  # (tokens, alternatives), the most probable first
    top_logprobs: NDArray[np.float32]  # (tokens, alternatives)

    def __len__(self) -> int:
        """Tokens told of."""
        return int(self.logprobs.shape[0])

    @property
    def num_top(self) -> int:
        """Alternatives to each token."""
        return int(self.top_ids.shape[1])

    @property
    def numbers_per_token(self) -> int:
        """Token ids and log-probabilities that tell of one token."""
        return 1 + 2 * self.num_top

    def part(self, begin: int, end: int, num_top: int | None = None) -> PromptLogprobs:
        """Tokens [begin, end) of it, with all alternatives or fewer."""
        return PromptLogprobs(
            self.logprobs[begin:end], self.top_ids[begin:end, :num_top], self.top_logprobs[begin:end, :num_top]
        )


def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
    """At least one part, in order, as one; all have as many alternatives."""
    if len(parts) == 1:
        return parts[0]
    return PromptLogprobs(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
    )
