"""python -m bench: policies side by side on this machine, each as a ratio to data_parallel in the same run."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Annotated

import grpc.aio
import typer
from microserve.router.v1 import router_pb2, router_pb2_grpc
from rich.table import Table

from bench.load import Load, Result, run_load
from services.cli.client import wait_serving
from services.cli.fleet import Fleet, core_count
from services.cli.models import fetch
from services.cli.output import say
from services.engine.model.catalogue import DEFAULT_MODEL
from services.rpc.channel import make_channel

POLICIES = "data_parallel,disaggregated,context_aware,balanced:0.5"


def main(
    model: str = DEFAULT_MODEL,
    engines: Annotated[int, typer.Option(min=2)] = 2,
    policies: Annotated[str, typer.Option(help="Comma separated; the first is the base of the ratios.")] = POLICIES,
    requests: Annotated[int, typer.Option(min=2)] = 8,
    concurrency: Annotated[int, typer.Option(min=1)] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 256,
    output_tokens: Annotated[int, typer.Option(min=2)] = 32,
) -> None:
    """Starts a suite, runs the same load under every policy, and prints a table."""
    load = Load(requests, concurrency, prompt_tokens, output_tokens)
    path = fetch(model)
    with Fleet() as fleet:
        kvtransfer = fleet.start_kvtransfer()
        threads = max(1, core_count() // engines)
        started = [fleet.start_engine(f"engine-{i}", path, kvtransfer, threads=threads) for i in range(engines)]
        router = fleet.start_router(started, "data_parallel")
        asyncio.run(_measure(router.address, policies.split(","), load))


async def _measure(address: str, policies: list[str], load: Load) -> None:
    await wait_serving(address, 60)
    async with make_channel(address) as channel:
        # Kernels compile and pages fault on first use.
        await run_load(channel, policies[0], Load(2, 2, load.prompt_tokens, 2, seed=1))
        call_s = await _call_cost(channel)
        results = [await run_load(channel, policy, load) for policy in policies]
    say(_table(results, load))
    print(f"an empty call to the router: {call_s * 1e3:.2f} ms (median of 200)")


async def _call_cost(channel: grpc.aio.Channel) -> float:
    """Seconds of one call that does next to nothing."""
    stub = router_pb2_grpc.RouterServiceStub(channel)
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        await stub.ListModels(router_pb2.ListModelsRequest())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _table(results: list[Result], load: Load) -> Table:
    title = (
        f"{load.request_count} requests, {load.concurrency} at once, {load.prompt_tokens} tokens in, "
        f"{load.output_tokens} out, {core_count()} cores; ratios to {results[0].policy}"
    )
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("policy", no_wrap=True)
    for name in ("ttft ms", "p90", "tpot ms", "jct ms", "tok/s", "ttft x", "tpot x", "jct x", "tok/s x"):
        table.add_column(name, justify="right", no_wrap=True)
    base = results[0]
    for result in results:
        table.add_row(
            result.policy,
            f"{result.first_token_s * 1e3:.0f}",
            f"{result.first_token_p90_s * 1e3:.0f}",
            f"{result.per_token_s * 1e3:.1f}",
            f"{result.total_s * 1e3:.0f}",
            f"{result.tokens_per_s:.1f}",
            f"{result.first_token_s / base.first_token_s:.2f}",
            f"{result.per_token_s / base.per_token_s:.2f}",
            f"{result.total_s / base.total_s:.2f}",
            f"{result.tokens_per_s / base.tokens_per_s:.2f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
