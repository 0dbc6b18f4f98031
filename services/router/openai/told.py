"""A prompt that an answer tells: its tokens, and how the model rates each of them after those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from services.router.openai.fields import finite
from services.router.prompt_logprobs import PromptLogprobs


@dataclass(frozen=True, slots=True)
class Told:
    """`logprobs` are of all tokens but the first, which follows nothing; None if there are no others."""

    token_ids: Sequence[int]
    logprobs: PromptLogprobs | None

    def rated(self, num_top: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """(log-probability, the best in its place) of each token but the first."""
        if self.logprobs is None:
            return []
        return list(zip(map(finite, self.logprobs.logprobs), self.logprobs.tops(num_top), strict=True))

    def by_id(self, num_top: int, name: Callable[[int], str]) -> list[dict[str, Any] | None]:
        """As vLLM's servers show it: for each token an object from token ids to what is known of them."""
        shown: list[dict[str, Any] | None] = [None]
        for token_id, (logprob, tops) in zip(self.token_ids[1:], self.rated(num_top), strict=True):
            entries: dict[int, tuple[float, int | None]] = {token_id: (logprob, None)}
            entries |= {each: (value, rank) for rank, (each, value) in enumerate(tops, start=1)}
            shown.append(
                {
                    str(each): {"logprob": finite(value), "rank": rank, "decoded_token": name(each)}
                    for each, (value, rank) in entries.items()
                }
            )
        return shown
