"""How long to wait before trying again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BackoffConfig:
    """Delays grow from `first_s` by `factor` to `longest_s`; each is shortened by up to half, at random."""

    first_s: float = 0.1
    longest_s: float = 2.0
    factor: float = 2.0


class Backoff:
    """The delays of one thing that is tried again and again."""

    def __init__(self, config: BackoffConfig) -> None:
        self._config = config
        self._delay_s = config.first_s

    async def wait(self) -> None:
        """Waits for the next delay. A fleet of routers must not knock at the same moment, hence the chance."""
        await asyncio.sleep(self._delay_s * random.uniform(0.5, 1.0))
        self._delay_s = min(self._delay_s * self._config.factor, self._config.longest_s)

    def reset(self) -> None:
        """It worked: the next failure begins with the shortest delay."""
        self._delay_s = self._config.first_s
