"""Into how many jobs the columns of a layer are split: tried when a model is loaded, for each shape and size of batch.

Only what gives the same bits is tried, so that no engine of a fleet, and no batch, computes another number than the
next. Torch's own kernels do not stand to choice for that reason: their rows depend on the batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from services.engine.kernels.jobs import Jobs
from services.engine.kernels.team import Team
from services.engine.model.linear.tiled import SPLITS, BatchSize, Tiled

BUDGET_S = 0.3  # for a model
WORTH_IT = 1.05  # how much faster one must be than the usual: less is noise
_SAMPLE_ROWS = {BatchSize.ONE: 1, BatchSize.MANY: 16}
_SAMPLE_BYTES = 64 << 20  # of weights that are gone through in turn: more than caches hold, as in a step

_log = logging.getLogger(__name__)


@torch.inference_mode()
def try_splits(layers: Sequence[Tiled], team: Team) -> None:
    """Has every layer split its columns as is fastest here. Takes BUDGET_S, or not much longer for large models."""
    if team.num_threads == 1:
        return
    shapes: dict[tuple[str, int, int], list[Tiled]] = {}
    for layer in layers:
        shapes.setdefault((type(layer).__name__, layer.depth, layer.num_columns), []).append(layer)
    for (_, depth, columns), alike in shapes.items():
        for size, num_rows in _SAMPLE_ROWS.items():
            seconds = _seconds(alike, team, size, num_rows, BUDGET_S / (len(shapes) * len(_SAMPLE_ROWS)))
            usual, best = SPLITS[0], min(SPLITS, key=seconds.__getitem__)
            chosen = best if seconds[best] * WORTH_IT < seconds[usual] else usual
            for layer in alike:
                layer.split(size, chosen)
            times = {f"{split}_ms": round(1000 * value, 3) for split, value in seconds.items()}
            fields = {"in": depth, "out": columns, "rows": num_rows, "jobs_a_thread": chosen, **times}
            _log.info("linear layers split", extra={"fields": fields})


def _seconds(alike: Sequence[Tiled], team: Team, size: BatchSize, num_rows: int, budget_s: float) -> dict[int, float]:
    """The least time that some of these layers took, one after the other, by their split."""
    some = alike[: -(-_SAMPLE_BYTES // alike[0].num_bytes)]
    rows = torch.ones(num_rows, alike[0].depth)
    arms: dict[int, Jobs] = {}
    for split in SPLITS:
        jobs = arms[split] = Jobs(team)
        for layer in some:
            layer.split(size, split)
            layer.add_to(jobs, rows)
    seconds = dict.fromkeys(SPLITS, float("inf"))
    deadline = time.perf_counter() + budget_s
    while True:
        for split, jobs in arms.items():
            began = time.perf_counter()
            jobs.run()
            seconds[split] = min(seconds[split], time.perf_counter() - began)
        if time.perf_counter() > deadline:
            return seconds
