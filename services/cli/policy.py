"""`microserve policy`: the router's programs."""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli import output
from services.cli.client import call_router
from services.cli.commands import DEFAULT_ADDRESS, Address, Json
from services.cli.errors import UsageError
from services.cli.values import Policy
from services.router.programs.library import named_file

app = typer.Typer(no_args_is_help=True, help="Router programs: what is at hand, what new requests use.")


@app.command("list")
def list_command(address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Lists the programs at hand."""

    policies = call_router(address, lambda router: router.list_policies())
    output.print_json(policies) if json else output.print_policies(policies)


@app.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Empty: the current one.")] = "",
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Prints a program's source."""

    policy, source = call_router(address, lambda router: router.get_policy(name))
    if json:
        output.print_json({"policy": policy.name, "file": policy.file, "source": source})
    else:
        print(source, end="")


@app.command("set")
def set_command(
    policy: Annotated[str, typer.Argument(metavar="NAME|FILE.py")],
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Changes the program for requests that begin from now on. A FILE is uploaded, where the router allows it."""
    name, source = read_program(policy)

    chosen = call_router(address, lambda router: router.set_policy(name, source))
    output.print_json(chosen) if json else print(_described(chosen))


@app.command("rollback")
def rollback_command(address: Address = DEFAULT_ADDRESS, json: Json = False) -> None:
    """Restores the last program that has answered a request before the current one."""

    restored = call_router(address, lambda router: router.roll_back_policy())
    output.print_json(restored) if json else print(_described(restored))


@app.command("split")
def split_command(
    shares: Annotated[list[str] | None, typer.Argument(metavar="[POLICY=PERCENT]...")] = None,
    end: Annotated[bool, typer.Option("--end", help="All requests go to the current program again.")] = False,
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Shares out requests between programs, or shows what came of it. The current program gets the rest."""
    wanted = dict(_share(text) for text in shares or ())
    if end and wanted:
        raise UsageError("--end takes no shares")

    change = bool(wanted) or end
    split = call_router(address, lambda router: router.split_policies(wanted) if change else router.get_split())
    output.print_json(split) if json else output.print_split(split)


def _described(policy: Policy) -> str:
    return f"{policy.name}: {policy.summary}" if policy.summary else policy.name


def _share(text: str) -> tuple[str, float]:
    policy, _, percent = text.rpartition("=")
    try:
        return policy, float(percent)
    except ValueError:
        raise UsageError(f"{text!r} is not POLICY=PERCENT") from None


def read_program(policy: str) -> tuple[str, str]:
    """Name, with parameters if there are some, and source, which is empty for a program that the router has."""
    named = named_file(policy)
    if named is None:
        return policy, ""
    path, params = named
    try:
        return f"{path.stem}:{params}".removesuffix(":"), path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
