"""The loads of the comparison, and the rates at which servers bear them."""

from __future__ import annotations

import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bench.engine.servers import Microserve, Server

# Ids that any vocabulary of a real model has, clear of its special tokens.
TOKEN_IDS = range(1_000, 30_000)


@dataclass(frozen=True, slots=True)
class Scenario:
    """So many requests at once, each with a prompt of its own."""

    key: str
    title: str
    streams: int
    prompt_tokens: int
    output_tokens: int

    @property
    def counted_tokens(self) -> int:
        """The tokens that its rate counts: outputs, or the prompt if there is next to no output."""
        return self.streams * (self.output_tokens if self.output_tokens > 1 else self.prompt_tokens)


SCENARIOS = (
    Scenario("one_stream", "1 stream, 32 in, 64 out", 1, 32, 64),
    Scenario("batch16", "16 streams, 128 in, 64 out", 16, 128, 64),
    Scenario("batch32", "32 streams, 64 in, 64 out", 32, 64, 64),
    Scenario("prefill", "prefill of 1024", 1, 1024, 1),
)
# Threads of a server that has answered may look for more work for a while, on the cores of the one whose turn it is.
SETTLE_S = 0.5
# Tokens per second by server name and scenario.
Rates = dict[tuple[str, Scenario], float]


def measure(servers: Sequence[Server], scenarios: Sequence[Scenario], rounds: int) -> Rates:
    """The median rate of each server under each load; the servers take turns, and each is warmed up first."""
    source = random.Random(0)
    seen: dict[tuple[str, Scenario], list[float]] = {}
    for scenario in scenarios:
        for number in range(-1, rounds):
            for server in servers:
                # Prompts are never used again, so that no prefix cache helps.
                prompts = [source.choices(TOKEN_IDS, k=scenario.prompt_tokens) for _ in range(scenario.streams)]
                time.sleep(SETTLE_S)
                rate = scenario.counted_tokens / run(server, prompts, scenario.output_tokens)
                print(
                    f"{scenario.key} round {number + 1} of {rounds}: {server.name} {rate:.1f} tokens/s", file=sys.stderr
                )
                if number >= 0:
                    seen.setdefault((server.name, scenario), []).append(rate)
    return {key: statistics.median(values) for key, values in seen.items()}


def run(server: Server, prompts: Sequence[Sequence[int]], output_tokens: int) -> float:
    """Seconds from the first request to the last answer, all sent at once. Raises RuntimeError for a short answer."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        began = time.perf_counter()
        counts = list(pool.map(lambda prompt: server.generate(prompt, output_tokens), prompts))
        elapsed = time.perf_counter() - began
    if counts != [output_tokens] * len(prompts):
        raise RuntimeError(f"{server.name} answered {counts} instead of {output_tokens} tokens each")
    return elapsed


def outside_model_share(server: Microserve) -> float:
    """The part of the time not spent in the model under 32 streams: schedule, sample, settle, stream, calls."""
    source = random.Random(1)
    prompts = [source.choices(TOKEN_IDS, k=64) for _ in range(32)]
    before = _model_seconds(server)
    elapsed = run(server, prompts, 256)
    return 1 - (_model_seconds(server) - before) / elapsed


def _model_seconds(server: Microserve) -> float:
    with urllib.request.urlopen(f"http://{server.process.metrics}/metrics", timeout=10) as page:
        text = page.read().decode()
    return next(
        float(line.split()[1]) for line in text.splitlines() if line.startswith("microserve_engine_model_seconds_total")
    )
