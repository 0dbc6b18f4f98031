"""`microserve policy`: the router's programs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from services.cli import output
from services.cli.client import router_client
from services.cli.commands import DEFAULT_ADDRESS, Address, Json
from services.cli.errors import CliError

app = typer.Typer(no_args_is_help=True, help="Router programs: what is at hand, what new requests use.")


@app.command("list")
def list_command(address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Lists the programs at hand."""

    async def run() -> None:
        async with router_client(address) as router:
            policies = await router.list_policies()
        output.print_json(policies) if json else output.print_policies(policies)

    asyncio.run(run())


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Empty: the current one.")] = "",
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Prints a program's source."""

    async def run() -> None:
        async with router_client(address) as router:
            policy, source = await router.get_policy(name)
        if json:
            output.print_json({"policy": policy.name, "file": policy.file, "source": source})
        else:
            print(source, end="")

    asyncio.run(run())


@app.command("set")
def set_command(
    policy: Annotated[str, typer.Argument(metavar="NAME|FILE")],
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Changes the program for requests that begin from now on. A FILE is uploaded, where the router allows it."""
    name, source = _read(policy)

    async def run() -> None:
        async with router_client(address) as router:
            chosen = await router.set_policy(name, source)
        output.print_json(chosen) if json else print(f"{chosen.name}: {chosen.summary}")

    asyncio.run(run())


def is_file(policy: str) -> bool:
    """Whether NAME|FILE means a file: it ends in .py or has a slash."""
    return policy.endswith(".py") or "/" in policy


def _read(policy: str) -> tuple[str, str]:
    """Name and source, which is empty for a program that the router has."""
    if not is_file(policy):
        return policy, ""
    try:
        return Path(policy).stem, Path(policy).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot read {policy}: {getattr(error, 'strerror', None) or error}") from None
