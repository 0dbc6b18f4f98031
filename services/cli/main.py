"""The command `microserve`. Whatever goes wrong is one line on stderr; docs/operations.md lists the exit codes."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.exceptions import TyperException

from services.cli import commands, engines, kv, planner, policy
from services.cli.errors import CliError, ServiceFailed
from services.cli.simulate import simulate
from services.cli.up import up
from services.cli.up_options import UpOptions
from services.engine.model.catalogue import DEFAULT_MODEL
from services.rpc.entry import raise_interrupts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Serves large language models through sub-request calls composed by router programs. The router's keys and"
    " certificates are taken from MICROSERVE_ROUTER_API_KEY, MICROSERVE_ROUTER_ADMIN_KEY and MICROSERVE_CLI_TLS_CA.",
)
app.command("ask")(commands.ask)
app.command("explain")(commands.explain)
app.command("simulate")(simulate)
app.add_typer(engines.app, name="engines")
app.add_typer(policy.app, name="policy")
app.add_typer(planner.app, name="planner")
app.add_typer(kv.app, name="kv")
app.add_typer(commands.model_app, name="model")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"microserve {version('microserve')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


@app.command("up")
def up_command(
    engines: Annotated[int, typer.Option(min=1, help="Engine processes to start.")] = 2,
    policy: Annotated[
        str | None, typer.Option(metavar="NAME|FILE.py", help="Router program.  [default: disaggregated]")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|DIR|FILE.gguf|HF-ID", help="What to serve.")] = DEFAULT_MODEL,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the router's gRPC; 0: a free one.")] = 50050,
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the router's HTTP; 0: a free one.")] = 8080,
    admin_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port that takes programs from your own commands: `microserve policy set FILE`.  [default: none]",
        ),
    ] = None,
    ask: Annotated[
        str, typer.Option(metavar="TEXT", help="Question to begin with; empty: none.")
    ] = "What is the capital of France?",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, packed, packed16, int8, float32, bfloat16, float16 or, on a GPU, fp8; auto: packed on the "
            "CPU.  [default: packed16 there]"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one event a line.")] = False,
) -> None:
    """Starts kvtransfer, engines and a router here, answers a question, and serves until Ctrl-C."""
    up(
        UpOptions(
            engine_count=engines,
            # One engine alone has nobody to hand its KV to.
            policy=policy or ("disaggregated" if engines > 1 else "data_parallel"),
            model=model,
            grpc_port=grpc_port,
            http_port=http_port,
            admin_port=admin_port,
            question=ask,
            # A small model's first words are a close thing, and activations of 8 bits may give others.
            dtype=dtype or ("packed16" if device == "cpu" else "auto"),
            device=device,
            json=json,
        )
    )


def main() -> None:
    """Runs the command of sys.argv and exits with its code."""
    raise_interrupts()
    # gRPC's core writes lines of its own about lost connections; a failed call says it already.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        code = typer.main.get_command(app).main(prog_name="microserve", standalone_mode=False)
    except TyperException as error:
        said = error.format_message()
        # A group that was given no command says its help.
        print(said if said.startswith("Usage: ") else f"microserve: {' '.join(said.split())}", file=sys.stderr)
        code = 2
    except CliError as error:
        print(f"microserve: {error}", file=sys.stderr)
        if isinstance(error, ServiceFailed) and error.log_tail:
            print(error.log_tail, file=sys.stderr)
        code = error.exit_code
    except typer.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
