"""How the model rates the tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from services.engine.sampling.prompt_logprobs import PromptLogprobs, joined

# Logits that are looked at together. A prompt of 3,000 tokens and 262,144 entries of the vocabulary has 3 GiB of them.
MAX_LOGITS_BYTES = 64 * 2**20


def rows_at_once(vocab_size: int) -> int:
    """Rows of float32 logits that may be in memory together; at least one."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


class PromptScorer:
    """The prompts of one step: for each the tokens to rate and the alternatives wanted. Logits come piece by piece."""

    def __init__(self, targets: Sequence[Sequence[int]], num_top: Sequence[int]) -> None:
        self._ends = list(accumulate(map(len, targets), initial=0))
        self._targets = list(chain.from_iterable(targets))
        self._num_top = num_top
        self._parts: list[PromptLogprobs] = []
        self._num_rated = 0

    def rate(self, logits: Tensor) -> None:
        """Takes logits (rows, vocab), float32 on any device, of the rows before the next targets. Each result depends
        on its own row alone."""
        begin, self._num_rated = self._num_rated, self._num_rated + logits.shape[0]
        targets = torch.tensor(self._targets[begin : self._num_rated], device=logits.device)[:, None]
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(max(self._num_top))
        self._parts.append(
            PromptLogprobs(
                logprobs.gather(1, targets)[:, 0].cpu().numpy(),
                best.indices.int().cpu().numpy(),
                best.values.cpu().numpy(),
            )
        )

    def results(self) -> list[PromptLogprobs]:
        """One for each prompt, once all their rows were rated."""
        whole = joined(self._parts)
        return [
            whole.part(begin, end, num_top)
            for (begin, end), num_top in zip(pairwise(self._ends), self._num_top, strict=True)
        ]
