"""What is sent: open-loop Poisson arrivals of three mixes, a pure function of a seed, so that arms can be paired."""

from __future__ import annotations

import random
from dataclasses import dataclass

from bench.load import TOKEN_IDS

SPREAD = 0.3  # lengths vary by up to this share around their mean


@dataclass(frozen=True, slots=True)
class Mix:
    """A kind of traffic; lengths in tokens, on average."""

    name: str
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0  # of the prompt, the same in NUM_TOPICS groups of requests


NUM_TOPICS = 4
MIXES = {
    mix.name: mix
    for mix in (
        Mix("long_short", 384, 16),
        Mix("chat", 64, 32),
        Mix("shared_prefix", 384, 16, shared_tokens=320),
    )
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when, in seconds from the start, and what."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def arrivals(mix: Mix, rate: float, count: int, seed: str) -> list[Arrival]:
    """`count` requests at `rate` requests/s on average. The same arguments give the same requests."""
    source = random.Random(f"{mix.name} {rate} {seed}")
    topics = [tuple(source.choices(TOKEN_IDS, k=mix.shared_tokens)) for _ in range(NUM_TOPICS)]
    made, now_s = list[Arrival](), 0.0
    for _ in range(count):
        now_s += source.expovariate(rate)
        own = max(1, round((mix.prompt_tokens - mix.shared_tokens) * source.uniform(1 - SPREAD, 1 + SPREAD)))
        prompt = (*source.choice(topics), *source.choices(TOKEN_IDS, k=own))
        output = max(2, round(mix.output_tokens * source.uniform(1 - SPREAD, 1 + SPREAD)))
        made.append(Arrival(now_s, prompt, output))
    return made
