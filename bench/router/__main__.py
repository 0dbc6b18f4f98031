"""python -m bench.router: how fast the router is, over engines that cost nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bench.router import choosing, engine_bound, forwarding, latency, others, overload, scaling
from bench.router.figures import Figure, Report
from bench.router.suite import Stubs
from services.cli.errors import CliError
from services.cli.fleet import core_count
from services.cli.output import say

Measure = Callable[[Stubs, int], Coroutine[Any, Any, list[Figure]]]

PARTS: dict[str, Measure] = {
    "latency": latency.measure,
    "forwarding": forwarding.measure,
    "engine_bound": engine_bound.measure,
    "choosing": choosing.measure,
    "overload": overload.measure,
    "scaling": scaling.measure,
    "others": others.measure,
}


def main(
    parts: Annotated[str, typer.Option(help="Comma separated.")] = ",".join(PARTS),
    rounds: Annotated[int, typer.Option(min=1, help="Of each arm; medians count.")] = 5,
    python: Annotated[
        str, typer.Option(help="Interpreter with other routers installed, to measure beside.")
    ] = sys.executable,
    out: Annotated[Path, typer.Option(help="JSON with flat keys.")] = Path("build/bench/router.json"),
) -> None:
    """Runs the parts one after the other, prints a table and writes the figures."""
    report = Report()
    measures = PARTS | {"others": partial(others.measure, python=python)}
    for package in others.missing(python):
        report.left_out[package] = "not installed (pip install --no-deps, into an environment of its own: --python)"
    for name in parts.split(","):
        with Stubs() as stubs:
            report.add(asyncio.run(measures[name](stubs, rounds)))
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text()) if out.exists() and parts != ",".join(PARTS) else {}
    out.write_text(json.dumps(before | report.flat(), indent=1) + "\n")
    say(_table(report))
    for what, why in report.left_out.items():
        print(f"left out: {what}: {why}")


def _table(report: Report) -> Table:
    table = Table(title=f"the router on {core_count()} cores, shared", title_justify="left", box=None)
    table.add_column("key", no_wrap=True)
    table.add_column("what")
    for name in ("value", "aim"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in report.figures:
        aim = "" if each.aim is None else f"{'>=' if each.at_least else '<='} {each.aim:,g}"
        table.add_row(each.key, each.what, f"{each.value:,.4g}", aim, style="" if each.reached else "yellow")
    return table


if __name__ == "__main__":
    try:
        typer.run(main)
    except (CliError, KeyError) as error:
        raise SystemExit(f"bench: {error}") from None
