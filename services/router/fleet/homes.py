"""Engines at which topics are at home: what a planner wants, as a hint to policies."""

from __future__ import annotations

from collections.abc import Mapping

from services.router.request import ModelKey, PolicyRequest

GRAIN = 64  # tokens of a block: the context of a topic is whole blocks


class Homes:
    """Addresses by the last block of a topic's context."""

    def __init__(self) -> None:
        self._of_model: dict[ModelKey, dict[bytes, tuple[str, ...]]] = {}

    def set(self, model: ModelKey, homes: Mapping[bytes, tuple[str, ...]]) -> None:
        """From now on, in place of all that were known of the model."""
        self._of_model[model] = dict(homes)

    def clear(self) -> None:
        """Nobody knows any more."""
        self._of_model.clear()

    def of(self, request: PolicyRequest) -> tuple[str, ...]:
        """The addresses for the topic with the longest context that the prompt begins with; empty: there is none."""
        homes = self._of_model.get(request.model)
        if homes:
            for block in reversed(request.block_hashes(GRAIN)):
                if block in homes:
                    return homes[block]
        return ()
