"""python -m bench.engine: one engine beside llama.cpp's server and vLLM's CPU build, arms interleaved in one run.

Rates are of whole requests, from the first sent to the last answered, over each server's own API. Writes
build/bench/engine.json: flat ratios, without the keys of a peer that is not installed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bench.engine.load import SCENARIOS, Rates, Scenario, measure, outside_model_share
from bench.engine.perplexity import perplexity
from bench.engine.servers import LlamaCpp, Microserve, Server, Vllm, find, start_engine
from bench.engine.start import start_figures
from services.cli.fleet import Fleet, core_count
from services.cli.models import fetch
from services.cli.output import say
from services.engine.model.catalogue import DEFAULT_MODEL
from services.engine.model.loader import model_folder

RESULT = Path("build/bench/engine.json")


DEFAULT = "packed"  # which ratios are of
OURS = (DEFAULT, "packed16", "int8", "float32")  # by --dtype
PEERS = ("llamacpp", "vllm")
ALL_LOADS = ",".join(each.key for each in SCENARIOS)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Times that each load runs on each server.")] = 3,
    threads: Annotated[int, typer.Option(min=1)] = core_count(),
    perplexity_tokens: Annotated[int, typer.Option(min=0, help="Tokens of text to judge packed on; 0: skip.")] = 20_480,
    servers: Annotated[str, typer.Option(help="Which servers, by commas.")] = "packed,packed16,float32,llamacpp,vllm",
    loads: Annotated[str, typer.Option(help="Which loads, by commas.")] = ALL_LOADS,
    start: Annotated[bool, typer.Option(help="Measure the start, too.")] = True,
) -> None:
    """Starts every server that is installed, loads them in turns, and prints a table.

    A figure that compares servers or loads that are left out is left out, too.
    """
    wanted = _chosen("--servers", servers, (*OURS, *PEERS))
    scenarios = [each for each in SCENARIOS if each.key in _chosen("--loads", loads, [each.key for each in SCENARIOS])]
    gguf = fetch(DEFAULT_MODEL)
    folder = model_folder(gguf)
    figures: dict[str, float] = start_figures() if start else {}
    with ExitStack() as resources:
        fleet = resources.enter_context(Fleet())
        ours = {name: start_engine(fleet, folder, name, threads, resources) for name in OURS if name in wanted}
        arms: list[Server] = [*ours.values(), *_peers(wanted, gguf, folder, threads, resources)]
        rates = measure(arms, scenarios, rounds)
        figures |= _ratios(rates, ours, scenarios)
        if DEFAULT in ours and any(each.key == "batch32" for each in scenarios):
            figures["outside_model_share"] = outside_model_share(ours[DEFAULT])
    if perplexity_tokens:
        figures["perplexity_over_float32"] = perplexity(folder, DEFAULT, threads, perplexity_tokens) / perplexity(
            folder, "float32", threads, perplexity_tokens
        )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2) + "\n")
    say(_table(rates, scenarios, threads))
    for name, value in figures.items():
        print(f"{name}: {value:.3f}")


def _chosen(option: str, names: str, known: Sequence[str]) -> set[str]:
    chosen = {name.strip() for name in names.split(",")}
    if unknown := sorted(chosen - set(known)):
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint=option)
    return chosen


def _peers(wanted: set[str], gguf: Path, folder: Path, threads: int, resources: ExitStack) -> list[Server]:
    logs = Path(resources.enter_context(tempfile.TemporaryDirectory()))
    peers: list[LlamaCpp | Vllm] = []
    if "llamacpp" in wanted:
        if llama := find("LLAMA_SERVER", "llama-server", "llama-cpp-server"):
            peers.append(LlamaCpp(llama, gguf, threads, logs))
        else:
            print("llama.cpp's server is not installed (LLAMA_SERVER names it, or llama-server on the PATH)")
    if "vllm" in wanted:
        if vllm := find("VLLM", "vllm"):
            peers.append(Vllm(vllm, folder, threads, logs))
        else:
            print("vLLM is not installed (VLLM names its command, or vllm on the PATH)")
    for peer in peers:
        resources.callback(peer.close)
    return [peer for peer in peers if _serves(peer)]


def _serves(peer: LlamaCpp | Vllm) -> bool:
    try:
        peer.wait_healthy()
    except RuntimeError as error:
        print(f"left out: {error}; the end of its log:\n{peer.log_end()}")
        return False
    return True


def _ratios(rates: Rates, ours: Mapping[str, Microserve], scenarios: Sequence[Scenario]) -> dict[str, float]:
    figures = {}
    peers = {server for server, _ in rates} - {server.name for server in ours.values()}
    for peer in sorted(peers):
        key = "llamacpp" if peer == "llama.cpp" else "vllm"
        if fast := ours.get(DEFAULT):
            for scenario in scenarios:
                figures[f"{scenario.key}_over_{key}"] = rates[fast.name, scenario] / rates[peer, scenario]
        exact = ours.get("float32")
        if exact is not None and key == "vllm":
            figures["float32_over_vllm_min"] = min(rates[exact.name, each] / rates[peer, each] for each in scenarios)
    return figures


def _table(rates: Rates, scenarios: Sequence[Scenario], threads: int) -> Table:
    table = Table(title=f"tokens/s (prefill: prompt tokens/s), {threads} threads", title_justify="left", box=None)
    table.add_column("server", no_wrap=True)
    for scenario in scenarios:
        table.add_column(scenario.title, justify="right")
    for server in dict.fromkeys(server for server, _ in rates):
        table.add_row(server, *(f"{rates[server, scenario]:.0f}" for scenario in scenarios))
    return table


if __name__ == "__main__":
    typer.run(main)
