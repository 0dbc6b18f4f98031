"""python -m bench.engine.profile: where a step's time goes on this machine, as a picture.

Real steps of the default model, each kernel's calls timed; what no kernel of ours takes is torch and Python.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib import pyplot
from numpy.typing import NDArray

from services.cli.fleet import core_count
from services.cli.models import fetch
from services.engine.attention import paged_kernels
from services.engine.attention.factory import make_attention
from services.engine.core.plan import SampleSpec, Segment, StepPlan
from services.engine.core.runner import TorchRunner
from services.engine.kernels.team import Team
from services.engine.model import ops_kernels
from services.engine.model.catalogue import DEFAULT_MODEL
from services.engine.model.linear import block_kernels, largest_kernels
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import load_model
from services.engine.sampling.params import SamplingParams

PAGE_SIZE, NUM_PAGES, REPEATS = 16, 1024, 15
PARTS = {
    block_kernels.MULTIPLY_NIBBLES[1]: "linear layers",
    block_kernels.MULTIPLY_BYTES[1]: "linear layers",
    largest_kernels.multiply_and_find: "linear layers",  # the head, as greedy decoding wants it
    largest_kernels.choose: "linear layers",
    block_kernels.QUANTISE_ROWS[1]: "rounding rows to bytes",
    paged_kernels.write: "attention",
    paged_kernels.attend_row: "attention",
    paged_kernels.attend_block: "attention",
    ops_kernels.activate: "activation",
    ops_kernels.add_norm: "norms",
    ops_kernels.rotate_and_store: "rotation and KV writes",
    ops_kernels.embed: "embedding, last sum",
    ops_kernels.add: "embedding, last sum",
}
AROUND = "around: sampling, Python"
# name: sequences, tokens of context, tokens computed of each
STEPS = {
    "1 stream\nat 64": (1, 63, 1),
    "16 streams\nat 160": (16, 159, 1),
    "32 streams\nat 96": (32, 95, 1),
    "512 tokens\nof a prompt": (1, 0, 512),
}


def main(
    threads: Annotated[int, typer.Option(min=1)] = core_count(), output: Path = Path("docs/images/engine-step.png")
) -> None:
    """Measures and draws."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    loaded = load_model(
        fetch(DEFAULT_MODEL),
        device=cpu,
        dtype=torch.float32,
        linear=linear_maker(cpu, torch.float32, threads, WeightForm.PACKED),
    )
    config = loaded.config
    kv = torch.zeros(config.num_layers, NUM_PAGES, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    runner = TorchRunner(loaded.model, make_attention(None, kv, loaded.model.config, threads), kv)
    shares = {name: _profile(runner, _plan(*shape)) for name, shape in STEPS.items()}
    _draw(shares, threads, output)
    for name, parts in shares.items():
        print(name.replace("\n", " "), {part: f"{seconds * 1e3:.2f} ms" for part, seconds in parts.items()})


def _plan(sequences: int, begin: int, count: int) -> StepPlan:
    pages = -(-(begin + count) // PAGE_SIZE)
    tokens = [1_000 + 7 * n for n in range(begin + count)]
    spec = SampleSpec(SamplingParams(), tokens, len(tokens))
    return StepPlan(
        tuple(
            Segment(n, begin, tokens[begin:], array("i", range(n * pages, (n + 1) * pages)), spec, num_single=1)
            for n in range(sequences)
        )
    )


def _profile(runner: TorchRunner, plan: StepPlan) -> dict[str, float]:
    """Median seconds of a step by part.

    Kernels are timed in steps whose jobs are run one by one, in turns with steps as they are. What the jobs leave of
    the latter is around them, a little too short: timing a job takes a part of a microsecond, too.
    """
    wholes, steps = [], []
    for _ in range(REPEATS):
        began = time.perf_counter()
        runner.run(plan, None)
        wholes.append(time.perf_counter() - began)
        with _timed_kernels() as parts:
            runner.run(plan, None)
        steps.append(parts)
    warm = slice(REPEATS // 3, None)
    result = {name: statistics.median(parts[name] for parts in steps[warm]) for name in dict.fromkeys(PARTS.values())}
    return {**result, AROUND: max(0.0, statistics.median(wholes[warm]) - sum(result.values()))}


@contextmanager
def _timed_kernels() -> Iterator[dict[str, float]]:
    seconds: dict[str, float] = dict.fromkeys(PARTS.values(), 0.0)
    run_all = Team.run_all

    def timed(team: Team, program: NDArray[np.int64]) -> None:
        for job in program:
            began = time.perf_counter()
            run_all(team, job[None])
            seconds[PARTS[int(job[0])]] += time.perf_counter() - began

    Team.run_all = timed  # type: ignore[method-assign, assignment]
    try:
        yield seconds
    finally:
        Team.run_all = run_all  # type: ignore[method-assign]


def _draw(shares: dict[str, dict[str, float]], threads: int, output: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    lefts = np.zeros(len(shares))
    for part in next(iter(shares.values())):
        widths = np.array([100 * parts[part] / sum(parts.values()) for parts in shares.values()])
        axes.barh(list(shares), widths, left=lefts, label=part)
        for row, (left, width) in enumerate(zip(lefts, widths, strict=True)):
            if width > 5:
                axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white")
        lefts += widths
    for row, parts in enumerate(shares.values()):
        axes.text(101, row, f"{sum(parts.values()) * 1e3:.1f} ms", va="center")
    axes.set(
        xlim=(0, 114), xlabel="% of the step", title=f"Where a step's time goes: SmolLM2-135M, Q4_1, {threads} threads"
    )
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    typer.run(main)
