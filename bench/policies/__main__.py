"""python -m bench.policies: every policy under the same Poisson arrivals, on two real engines of this machine."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from bench.load import Sample
from bench.policies.drive import calibrate, send
from bench.policies.plot import plot
from bench.policies.results import Run, rows, summary
from bench.policies.traffic import MIXES, arrivals
from services.cli.client import wait_serving
from services.cli.errors import CliError
from services.cli.fleet import Fleet, core_count
from services.cli.models import fetch
from services.engine.model.catalogue import DEFAULT_MODEL
from services.rpc.channel import make_channel

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
POLICIES = "data_parallel,disaggregated,context_aware,balanced:0.5,migrate_then_run,adaptive"
GOOD = 5.0  # times what a request alone takes


def main(
    model: str = DEFAULT_MODEL,
    policies: Annotated[str, typer.Option(help="Comma separated.")] = POLICIES,
    mixes: Annotated[str, typer.Option(help=f"Of {', '.join(MIXES)}.")] = "long_short,chat",
    loads: Annotated[str, typer.Option(help="Offered loads as shares of the measured capacity.")] = "0.4,0.7,1.0",
    full: Annotated[bool, typer.Option("--full", help="All mixes, five loads.")] = False,
    requests: Annotated[int, typer.Option(min=2, help="For each policy, cell and repeat.")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    first_repeat: Annotated[int, typer.Option(min=0, help="Number of the first one, to go on with --append.")] = 0,
    append: Annotated[bool, typer.Option("--append", help="Add to what --out holds; keeps its rates.")] = False,
    out: Annotated[Path, typer.Option(help="JSON; the picture lies beside it.")] = Path("build/bench/policies.json"),
) -> None:
    """Runs the sweep, and writes rows, comparison and picture."""
    chosen = list(MIXES.values()) if full else [MIXES[name] for name in mixes.split(",")]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0] if full else [float(each) for each in loads.split(",")]
    raw = out.with_suffix(".raw.json")
    runs = _read(raw) if append and raw.exists() else []
    path = fetch(model)
    with Fleet() as fleet:
        kvtransfer = fleet.start_kvtransfer()
        threads = max(1, core_count() // 2)
        engines = [fleet.start_engine(f"engine-{i}", path, kvtransfer, threads=threads) for i in range(2)]
        files = ["--policy-file", str(EXAMPLES / "migrate_then_run.py")]
        router = fleet.start_router(engines, "data_parallel", extra=files)
        sweep = _Sweep(router.address, policies.split(","), requests, runs)
        for repeat in range(first_repeat, first_repeat + repeats):
            for mix in chosen:
                asyncio.run(sweep.cells(mix.name, shares, repeat, lambda: _write(runs, raw, out)))
    found = summary(runs)
    print(json.dumps({key: found[key] for key in ("adaptive_speedup_geomean", "adaptive_worst_cell_upper", "cells")}))


class _Sweep:
    """The loop over cells of one suite. Policies take turns within a cell, in an order that changes."""

    def __init__(self, address: str, policies: list[str], num_requests: int, runs: list[Run]) -> None:
        self._address = address
        self._policies = policies
        self._num_requests = num_requests
        self._runs = runs

    async def cells(self, mix_name: str, loads: list[float], repeat: int, save: Callable[[], None]) -> None:
        """All loads of a mix, under every policy, once; `save` is called when a cell is done."""
        mix = MIXES[mix_name]
        await wait_serving(self._address, 120)
        async with make_channel(self._address) as channel:
            capacity = await calibrate(channel, mix, f"{repeat}")
            for load in loads:
                # Repeats of a cell have one rate, though capacity is measured again each time.
                known = [run for run in self._runs if run.cell == (mix_name, load)]
                rate = known[0].rate if known else load * capacity.rate
                requests = arrivals(mix, rate, self._num_requests, f"{repeat}")
                order = random.Random(f"{mix_name} {load} {repeat}").sample(self._policies, len(self._policies))
                for policy in track(order, f"{mix_name} {load:g} x capacity, repeat {repeat}"):
                    # A salt of its own: no policy finds in a cache what another one computed.
                    salt = f"{policy} {load} {repeat}"
                    samples, elapsed_s = await send(channel, policy, requests, salt)
                    limits = (known[0].ttft_limit_s, known[0].tpot_limit_s) if known else None
                    ttft_s, tpot_s = limits or (GOOD * capacity.ttft_s, GOOD * capacity.tpot_s)
                    run = Run(policy, mix_name, load, rate, repeat, elapsed_s, samples, ttft_s, tpot_s)
                    self._runs.append(run)
                save()


def _read(path: Path) -> list[Run]:
    runs = []
    for each in json.loads(path.read_text()):
        samples = tuple(None if sample is None else Sample(**sample) for sample in each.pop("samples"))
        runs.append(Run(samples=samples, **each))
    return runs


def _write(runs: list[Run], raw: Path, out: Path) -> None:
    """After every step, so that a sweep that is cut off is not lost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps([asdict(run) for run in runs]))
    out.write_text(json.dumps(summary(runs), indent=1))
    plot(rows(runs), out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except CliError as error:
        raise SystemExit(f"bench: {error}") from None
