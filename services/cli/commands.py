"""The commands that ask a running router, and `model fetch`."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated

import typer

from services.cli import output
from services.cli.client import RouterClient, call_router
from services.cli.errors import UsageError
from services.cli.models import fetch
from services.cli.values import Answer, Question

DEFAULT_ADDRESS = "127.0.0.1:50050"

Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="The router's gRPC address.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

model_app = typer.Typer(no_args_is_help=True, help="Models in the cache of this user.")


def ask(
    text: Annotated[str, typer.Argument(help="The question.")],
    policy: Annotated[str, typer.Option(help="Router program for this request.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, help="Same seed, same answer.")] = None,
    model: Annotated[str, typer.Option(help="Which one, where the router serves several.")] = "",
    raw: Annotated[bool, typer.Option("--raw", help="Continue TEXT with no chat template.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Show what every verb did.")] = False,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds that the answer may take.")] = 300.0,
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Asks the router and streams the answer."""
    question = Question(text, policy, max_tokens, temperature, seed, model, raw)

    answer = call_router(address, lambda router: stream_answer(router, question, quiet=json, timeout_s=timeout))
    if json:
        output.print_json(answer)
    elif trace:
        output.print_legs(answer)


def explain(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="Its id, as `microserve ask --json` prints it.")],
    address: Address = DEFAULT_ADDRESS,
    json: Json = False,
) -> None:
    """Shows why a recent request ran where it did, and what came of it."""

    explanation = call_router(address, lambda router: router.explain(request))
    output.print_json(explanation) if json else output.print_explanation(explanation)


@model_app.command("fetch")
def fetch_command(name: Annotated[str, typer.Argument(metavar="NAME|DIR|FILE.gguf|HF-ID")], json: Json = False) -> None:
    """Brings a model into the cache and prints its folder."""
    folder = fetch(name, quiet=json)
    if json:
        output.print_json({"model": name, "path": str(folder)})
    else:
        print(folder)


def is_for_subcommand(context: typer.Context, address: str, json: bool) -> bool:
    """Whether a group of commands that shows something by itself was called for one of its commands. UsageError for
    options before that one, which would have no effect."""
    if context.invoked_subcommand is None:
        return False
    if json or address != DEFAULT_ADDRESS:
        raise UsageError(f"options go behind `{context.invoked_subcommand}`")
    return True


async def stream_answer(router: RouterClient, question: Question, *, quiet: bool, timeout_s: float = 300.0) -> Answer:
    """Asks, prints the text as it comes unless `quiet`, and returns the whole. CliError."""
    answer = None
    async with aclosing(router.generate(question, timeout_s=timeout_s)) as pieces:
        async for piece in pieces:
            if isinstance(piece, Answer):
                answer = piece
            elif not quiet:
                output.print_piece(piece)
    if not quiet:
        print(flush=True)
    assert answer is not None  # the stream's last value, or an exception
    return answer
