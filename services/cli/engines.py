"""`microserve engines`: the fleet as the router sees it, and who of it takes work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

import typer

from services.cli import output
from services.cli.client import router_client
from services.cli.commands import DEFAULT_ADDRESS, Address, Json
from services.cli.errors import CliError
from services.cli.values import Engine

app = typer.Typer(help="Engines of the router.")
Which = Annotated[str, typer.Argument(metavar="NAME", help="An engine's name or address.")]


@app.callback(invoke_without_command=True)
def engines(context: typer.Context, address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Shows the fleet as the router sees it."""
    if context.invoked_subcommand is not None:
        if json or address != DEFAULT_ADDRESS:
            raise CliError(f"options go behind `{context.invoked_subcommand}`")
        return

    async def run() -> None:
        async with router_client(address) as router:
            fleet = await router.list_engines()
        output.print_json(fleet) if json else output.print_engines(fleet)

    asyncio.run(run())


@app.command("drain")
def drain(
    name: Which,
    migrate: Annotated[
        bool, typer.Option("--migrate", help="What runs there goes on elsewhere at once, with its KV moved.")
    ] = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Begins nothing new on an engine."""
    asyncio.run(_drain(address, name, resume=False, migrate=migrate))


@app.command("resume")
def resume(name: Which, address: Address = DEFAULT_ADDRESS) -> None:
    """Gives an engine work again."""
    asyncio.run(_drain(address, name, resume=True, migrate=False))


@app.command("add")
def add(
    engine: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Its gRPC address.")],
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Takes an engine into the fleet. It gets work as soon as it is healthy."""

    async def run() -> None:
        async with router_client(address) as router:
            await router.add_engine(engine)
        print(f"{engine} is in the fleet")

    asyncio.run(run())


@app.command("remove")
def remove(name: Which, address: Address = DEFAULT_ADDRESS) -> None:
    """Takes an engine out of the fleet. What it has begun it ends; `drain --migrate` first moves that elsewhere."""

    async def run() -> None:
        async with router_client(address) as router:
            await router.remove_engine(_find(name, await router.list_engines()))
        print(f"{name} is out of the fleet")

    asyncio.run(run())


async def _drain(address: str, name: str, *, resume: bool, migrate: bool) -> None:
    async with router_client(address) as router:
        engine = _find(name, await router.list_engines())
        await router.drain_engine(engine, resume=resume, migrate=migrate)
    print(f"{name} {'takes work again' if resume else 'takes no new work'}")


def _find(name: str, fleet: Sequence[Engine]) -> str:
    """The address of the engine of that name or address."""
    found = [engine.address for engine in fleet if name in (engine.name, engine.address)]
    if len(found) > 1:
        raise CliError(f"{len(found)} engines are named {name}: give an address, one of {', '.join(found)}")
    if not found:
        raise CliError(f"the router has no engine {name}: `microserve engines` lists them")
    return found[0]
