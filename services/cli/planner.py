"""`microserve planner`: what the router's planner sees and does; starting and stopping one."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli import output
from services.cli.client import call_router
from services.cli.commands import DEFAULT_ADDRESS, Address, Json, is_for_subcommand
from services.cli.policy import read_program

app = typer.Typer(help="The program that moves hot contexts between engines before requests come for them.")


@app.callback(invoke_without_command=True)
def planner(context: typer.Context, address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Shows the planner, the topics of the traffic, and what was moved and why."""
    if is_for_subcommand(context, address, json):
        return
    state = call_router(address, lambda router: router.get_planner())
    output.print_json(state) if json else output.print_planner(state)


@app.command("start")
def start(
    planner: Annotated[str, typer.Argument(metavar="NAME|FILE.py")] = "by_topic", address: Address = DEFAULT_ADDRESS
) -> None:
    """Runs a planner in place of the present one. A FILE is uploaded, where the router allows it."""
    name, source = read_program(planner)

    call_router(address, lambda router: router.start_planner(name, source))
    print(f"{name} runs")


@app.command("stop")
def stop(address: Address = DEFAULT_ADDRESS) -> None:
    """Ends the planner; moves under way are broken off."""

    call_router(address, lambda router: router.stop_planner())
    print("no planner runs")
