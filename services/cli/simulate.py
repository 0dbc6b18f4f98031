"""`microserve simulate`: router programs over simulated engines."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated

import typer
from rich.table import Table

from services.cli import output
from services.cli.commands import Json
from services.cli.errors import UsageError
from services.router.errors import RouterError
from services.router.programs import runner
from services.router.programs.library import named_file
from services.router.simulate.fleet import Arrival, simulated_router
from services.router.simulate.hardware import HARDWARE, FleetHardware
from services.router.traces import Trace
from services.rpc.virtual_loop import run

_MAX_KINDS = 20  # of failures shown: some name the request
_SPREAD = 0.3  # lengths vary by up to this share around their mean


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a policy did. Times in milliseconds, means but for the last; None where no request was answered."""

    policy: str
    requests: int
    failed: int
    ttft_ms: float | None
    tpot_ms: float | None
    jct_ms: float | None
    jct_p99_ms: float | None


def simulate(
    policies: Annotated[list[str], typer.Argument(metavar="NAME|FILE.py...", help="Router programs to compare.")],
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second, Poisson.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, max=100_000)] = 200,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=4096, help="On average.")] = 384,
    shared_tokens: Annotated[int, typer.Option(min=0, max=4096, help="More, the same in every prompt.")] = 0,
    output_tokens: Annotated[int, typer.Option(min=1, max=2048, help="On average.")] = 32,
    engines: Annotated[int, typer.Option(min=1, max=1000)] = 2,
    hardware: Annotated[str, typer.Option(help=f"What an engine is like: {', '.join(HARDWARE)}.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the arrivals.")] = 0,
    json: Json = False,
) -> None:
    """Runs router programs over simulated engines, each with the same arrivals, on a clock that jumps."""
    if hardware not in HARDWARE:
        raise UsageError(f"--hardware is one of {', '.join(HARDWARE)}")
    fleet = FleetHardware.alike(hardware, engines)
    arrivals = _arrivals(random.Random(seed), rate, requests, prompt_tokens, shared_tokens, output_tokens)
    results = [_row(policy, _traces(policy, fleet, arrivals)) for policy in policies]
    output.print_json(results) if json else output.say(_table(results))


def _traces(policy: str, fleet: FleetHardware, arrivals: Sequence[Arrival]) -> list[Trace]:
    async def main() -> list[Trace]:
        named = named_file(policy)
        async with simulated_router(fleet, [] if named is None else [named[0]]) as router:
            return await router.serve(policy if named is None else f"{named[0].stem}:{named[1]}", arrivals)

    once = _Once()
    runner.log.addFilter(once)
    try:
        return run(main(), longest_s=math.inf)
    except RouterError as error:
        raise UsageError(error.message) from None
    finally:
        runner.log.removeFilter(once)
        if once.num_left_out:
            runner.log.warning("%d failures like these were left out", once.num_left_out)


class _Once(logging.Filter):
    """Lets every kind of failure through once, and counts the rest: what fails one simulated request fails hundreds."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()
        self.num_left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        raised = record.exc_info[1] if record.exc_info else None
        kind = record.msg, repr(raised)
        is_new = kind not in self._seen and len(self._seen) < _MAX_KINDS
        if is_new:
            self._seen.add(kind)
        else:
            self.num_left_out += 1
        return is_new


def _arrivals(
    source: random.Random, rate: float, count: int, prompt_tokens: int, shared_tokens: int, output_tokens: int
) -> list[Arrival]:
    shared, made, now_s = tuple(range(shared_tokens)), list[Arrival](), 0.0
    for _ in range(count):
        now_s += source.expovariate(rate)
        own = max(1, round(prompt_tokens * source.uniform(1 - _SPREAD, 1 + _SPREAD)))
        wanted = max(1, round(output_tokens * source.uniform(1 - _SPREAD, 1 + _SPREAD)))
        made.append(Arrival(now_s, (*shared, *source.choices(range(1 << 20), k=own)), wanted))
    return made


def _row(policy: str, traces: Sequence[Trace]) -> Simulated:
    answered = [trace for trace in traces if trace.code == "OK"]
    jcts = sorted(trace.duration_s for trace in answered)
    return Simulated(
        policy=policy,
        requests=len(traces),
        failed=len(traces) - len(answered),
        ttft_ms=_mean_ms([trace.first_token_s for trace in answered]),
        tpot_ms=_mean_ms([trace.per_token_s for trace in answered]),
        jct_ms=_mean_ms(jcts),
        jct_p99_ms=_mean_ms(jcts[int(0.99 * len(jcts)) :][:1]),
    )


def _mean_ms(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 1e3 * fmean(known) if known else None


def _table(results: Sequence[Simulated]) -> Table:
    numbers = ["requests", "failed", "ttft ms", "tpot ms", "jct ms", "jct p99 ms"]
    table = output.make_table("Simulated", ["policy"], numbers)
    for each in results:
        times = (each.ttft_ms, each.tpot_ms, each.jct_ms, each.jct_p99_ms)
        shown = ["" if time is None else f"{time:.1f}" for time in times]
        table.add_row(each.policy, str(each.requests), str(each.failed), *shown)
    return table
