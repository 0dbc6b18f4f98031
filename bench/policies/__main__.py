"""python -m bench.policies: every policy under the same Poisson arrivals, on two real engines of this machine."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import grpc.aio
import typer
from rich.progress import track

from bench.load import Sample
from bench.policies.drive import Capacity, calibrate, send
from bench.policies.machine import Machine
from bench.policies.plot import plot
from bench.policies.results import Run, rows, summary
from bench.policies.traffic import MIXES, Mix, arrivals
from services.cli.client import wait_serving
from services.cli.errors import CliError
from services.cli.fleet import Fleet, core_count
from services.cli.models import fetch
from services.engine.model.catalogue import DEFAULT_MODEL
from services.rpc.channel import make_channel

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
POLICIES = "data_parallel,disaggregated,context_aware,balanced:0.5,migrate_then_run,adaptive"
GOOD = 5.0  # times what a request alone takes
# A run before or after which the machine was slower than this, or during which others had more of it, is done again,
# whatever came of it; of all tries the one that was disturbed least counts.
MOST_SLOWDOWN = 1.2
MOST_OTHERS = 0.05
MOST_TRIES = 2


def main(
    model: str = DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="Weights of the engines: int8 or float32.")] = ("int8"),
    policies: Annotated[str, typer.Option(help="Comma separated.")] = POLICIES,
    mixes: Annotated[str, typer.Option(help=f"Of {', '.join(MIXES)}.")] = "long_short,chat",
    loads: Annotated[str, typer.Option(help="Offered loads as shares of the measured capacity.")] = "0.4,0.7,1.0",
    full: Annotated[bool, typer.Option("--full", help="All mixes, five loads.")] = False,
    requests: Annotated[int, typer.Option(min=2, help="For each policy, cell and repeat.")] = 16,
    repeats: Annotated[int, typer.Option(min=1)] = 8,
    minutes: Annotated[float, typer.Option(help="After which no further repeat begins.")] = 20.0,
    append: Annotated[bool, typer.Option("--append", help="More repeats of what --out holds, at its rates.")] = False,
    out: Annotated[Path, typer.Option(help="JSON; the picture lies beside it.")] = Path("build/bench/policies.json"),
) -> None:
    """Runs the sweep, and writes rows, comparison and picture."""
    chosen = list(MIXES.values()) if full else [MIXES[name] for name in mixes.split(",")]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0] if full else [float(each) for each in loads.split(",")]
    raw = out.with_suffix(".raw.json")
    runs = _read(raw, dtype) if append and raw.exists() else []
    path = fetch(model)
    with Fleet() as fleet:
        kvtransfer = fleet.start_kvtransfer()
        threads = max(1, core_count() // 2)
        engines = [fleet.start_engine(f"engine-{i}", path, kvtransfer, threads=threads, dtype=dtype) for i in range(2)]
        files = ["--policy-file", str(EXAMPLES / "migrate_then_run.py")]
        router = fleet.start_router(engines, "data_parallel", extra=files)
        machine = Machine(core_count(), [process.pid for process in fleet.processes])
        sweep = Sweep(policies.split(","), requests, runs, machine, save=lambda: _write(runs, dtype, raw, out))
        asyncio.run(sweep.run(router.address, chosen, shares, repeats, 60 * minutes))
    found = summary(runs)
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))


class Sweep:
    """Every cell under every policy, again and again. Policies take turns within a cell, in an order that changes."""

    def __init__(
        self, policies: list[str], num_requests: int, runs: list[Run], machine: Machine, save: Callable[[], None]
    ) -> None:
        """`runs` gets longer; what it holds already is gone on with. `save` is called when a cell is done."""
        self._machine = machine
        self._policies = policies
        self._num_requests = num_requests
        self._runs = runs
        self._save = save

    async def run(
        self, address: str, mixes: Sequence[Mix], loads: Sequence[float], repeats: int, most_s: float
    ) -> None:
        """So many repeats more of these cells, but none that would begin after `most_s` seconds."""
        end_s = time.monotonic() + most_s
        await wait_serving(address, 120)
        begin = max((run.repeat + 1 for run in self._runs), default=0)
        async with make_channel(address) as channel:
            # Of each mix at the beginning, also when rates are known: the router learns from it how fast engines are.
            capacities = {mix.name: await calibrate(channel, mix) for mix in mixes}
            for repeat in range(begin, begin + repeats):
                if time.monotonic() > end_s:
                    break
                for mix in mixes:
                    for load in loads:
                        await self._cell(channel, mix, load, repeat, capacities[mix.name])
                        self._save()

    async def _cell(self, channel: grpc.aio.Channel, mix: Mix, load: float, repeat: int, capacity: Capacity) -> None:
        # Repeats of a cell have one rate, and one measure of what is good.
        limits = load * capacity.rate, GOOD * capacity.ttft_s, GOOD * capacity.tpot_s
        known = (run for run in self._runs if run.cell == (mix.name, load))
        rate, ttft_s, tpot_s = next(((run.rate, run.ttft_limit_s, run.tpot_limit_s) for run in known), limits)
        requests = arrivals(mix, rate, self._num_requests, f"{repeat}")
        order = random.Random(f"{mix.name} {load} {repeat}").sample(self._policies, len(self._policies))
        for policy in track(order, f"{mix.name} {load:g} x capacity, repeat {repeat}"):
            tries = list[Run]()
            while len(tries) < MOST_TRIES and all(map(_disturbed, tries)):
                # A salt of its own: no run finds in a cache what another one computed.
                salt = f"{policy} {load} {repeat} {len(tries)}"
                before = await self._machine.calm(MOST_SLOWDOWN)
                watch = self._machine.watch()
                samples, elapsed_s = await send(channel, policy, requests, salt)
                others, slowdown = watch(), max(before, self._machine.slowdown())
                good = ttft_s, tpot_s
                tries.append(Run(policy, mix.name, load, rate, repeat, elapsed_s, samples, *good, slowdown, others))
            self._runs.append(min(tries, key=lambda run: run.slowdown - 1 + run.others))


def _disturbed(run: Run) -> bool:
    return run.slowdown > MOST_SLOWDOWN or run.others > MOST_OTHERS


def _read(path: Path, dtype: str) -> list[Run]:
    """CliError where engines had other weights."""
    held = json.loads(path.read_text())
    if held["dtype"] != dtype:
        raise CliError(f"{path} is of {held['dtype']} engines")
    runs = []
    for each in held["runs"]:
        samples = tuple(None if sample is None else Sample(**sample) for sample in each.pop("samples"))
        runs.append(Run(samples=samples, **each))
    return runs


def _write(runs: list[Run], dtype: str, raw: Path, out: Path) -> None:
    """After every cell, so that a sweep that is cut off is not lost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    raw.write_text(json.dumps({"dtype": dtype, "runs": [asdict(run) for run in runs]}))
    out.write_text(json.dumps({"dtype": dtype, **summary(runs)}, indent=1))
    plot(rows(runs), out.with_suffix(".png"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except CliError as error:
        raise SystemExit(f"bench: {error}") from None
