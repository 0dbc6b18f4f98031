"""`microserve engines`: the fleet as the router sees it, and who of it takes work."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli import output
from services.cli.client import RouterClient, call_router
from services.cli.commands import DEFAULT_ADDRESS, Address, Json, is_for_subcommand
from services.cli.errors import CliError

app = typer.Typer(help="Engines of the router.")
Which = Annotated[str, typer.Argument(metavar="NAME", help="An engine's name or address.")]


@app.callback(invoke_without_command=True)
def engines(context: typer.Context, address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Shows the fleet as the router sees it."""
    if is_for_subcommand(context, address, json):
        return
    fleet = call_router(address, lambda router: router.list_engines())
    output.print_json(fleet) if json else output.print_engines(fleet)


@app.command("drain")
def drain(
    name: Which,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="What runs there goes on elsewhere at once, with its KV moved.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Begins nothing new on an engine."""
    _drain(address, name, resume=False, migrate=migrate)


@app.command("resume")
def resume(name: Which, address: Address = DEFAULT_ADDRESS) -> None:
    """Gives an engine work again."""
    _drain(address, name, resume=True, migrate=False)


@app.command("add")
def add(
    engine: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Its gRPC address.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Takes an engine into the fleet. It gets work as soon as it is healthy."""

    call_router(address, lambda router: router.add_engine(engine))
    print(f"{engine} is in the fleet")


@app.command("remove")
def remove(name: Which, address: Address = DEFAULT_ADDRESS) -> None:
    """Takes an engine out of the fleet. What it has begun it ends; `drain --migrate` first moves that elsewhere."""

    async def call(router: RouterClient) -> None:
        await router.remove_engine(await _find(router, name))

    call_router(address, call)
    print(f"{name} is out of the fleet")


def _drain(address: str, name: str, *, resume: bool, migrate: bool) -> None:
    async def call(router: RouterClient) -> None:
        await router.drain_engine(await _find(router, name), resume=resume, migrate=migrate)

    call_router(address, call)
    print(f"{name} {'takes work again' if resume else 'takes no new work'}")


async def _find(router: RouterClient, name: str) -> str:
    """The address of the engine of that name or address."""
    found = [engine.address for engine in await router.list_engines() if name in (engine.name, engine.address)]
    if len(found) > 1:
        raise CliError(f"{len(found)} engines are named {name}: give an address, one of {', '.join(found)}")
    if not found:
        raise CliError(f"the router has no engine {name}: `microserve engines` lists them")
    return found[0]
