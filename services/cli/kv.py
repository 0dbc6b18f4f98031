"""`microserve kv`: what moving KV costs on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from services.cli import output
from services.cli.errors import CliError, UsageError
from services.cli.fleet import core_count
from services.cli.kvbench import network, report
from services.cli.kvbench.control import measure_control
from services.cli.kvbench.copying import measure_copying
from services.cli.kvbench.overlap import measure_overlap
from services.cli.kvbench.values import Report
from services.cli.models import fetch, require_engine
from services.engine.model.catalogue import DEFAULT_MODEL

app = typer.Typer(no_args_is_help=True, help="Moving KV between engines.")


@app.callback()
def kv() -> None:
    """Moving KV between engines."""


@app.command("bench")
def bench(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each comparison; the medians count.")] = 9,
    model: Annotated[str, typer.Option(help="What the engines of the overlap compute.")] = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where kv.json and kv.png go.")] = Path("build/bench"),
    json: Annotated[bool, typer.Option("--json", help="Print the ratios as JSON.")] = False,
) -> None:
    """Measures transfers of real processes beside what they are compared with; docs/benchmarks.md says how."""
    require_engine()
    try:
        out.mkdir(parents=True, exist_ok=True)  # before minutes of measuring
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    found = asyncio.run(_measure(fetch(model, quiet=json), rounds, quiet=json))
    written = report.write(found, out)
    if json:
        output.print_json(found.flat())
        return
    output.say(report.table(found))
    for what, why in found.left_out.items():
        print(f"not measured: {what}: {why}")
    print("written: " + ", ".join(str(path) for path in written))


async def _measure(model: Path, rounds: int, *, quiet: bool) -> Report:
    def tell(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    found = Report()
    tell("copies within a service ...")
    found.comparisons |= await measure_copying(rounds, max(1, min(2, core_count())))
    if (why := network.missing()) is None:
        tell("tcp beside iperf3 ...")
        found.comparisons |= await network.measure_network(rounds)
    else:
        found.left_out["tcp_over_iperf"] = why
    tell("verbs that move nothing ...")
    found.comparisons |= await measure_control(rounds)
    tell("layers over a slow link ...")
    try:
        found.overlap = await measure_overlap(model, rounds)
    except CliError as error:
        found.left_out["exposed_over_total"] = str(error)
    return found
