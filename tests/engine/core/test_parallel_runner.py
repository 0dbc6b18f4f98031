"""What rank 0 says and waits for around a step of several ranks."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch

from services.engine.core.plan import Computed, PageCopy, RunnerBroken, SampleSpec, Segment, StepPlan
from services.engine.model.shard import Collective, Shard
from services.engine.parallel.messages import Compute, CopyPages, Poison
from services.engine.parallel.pool import pool_part
from services.engine.parallel.ranks import Ranks
from services.engine.parallel.runner import ParallelRunner
from services.engine.sampling.params import SamplingParams

NUM_LAYERS = 3
SPEC = SampleSpec(SamplingParams(), (1, 2, 3), 3)


class Played:
    """Rank 0's own runner and the other ranks, who write down what happens to them."""

    lag = 0

    def __init__(self, *, fails: bool = False) -> None:
        self.events: list[str] = []
        self._fails = fails

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Computed:
        for layer in range(NUM_LAYERS):
            self.events.append(f"rank 0 writes {layer}")
            if on_layer is not None:
                on_layer(layer)
        if self._fails:
            raise MemoryError("in the middle")
        return Computed()

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        raise AssertionError("no step copies by itself")

    def poison(self, pages: Sequence[int]) -> None:
        raise AssertionError("no step poisons")

    def tell(self, message: Compute) -> None:
        self.events.append("ranks begin")

    def ask(self, message: CopyPages | Poison) -> None:
        assert message == CopyPages(())
        self.events.append("ranks have ended")

    def step(self, sample: SampleSpec | None, *, told: bool = True) -> list[str]:
        plan = StepPlan((Segment(0, 0, (1, 2, 3), array("i", [1]), sample),))
        runner = ParallelRunner(self, cast(Ranks, self))
        runner.launch(plan, (lambda layer: self.events.append(f"told of {layer}")) if told else None)
        return self.events


def test_a_layer_is_told_of_when_the_ranks_have_added_it_up() -> None:
    begin, *events = Played().step(SPEC)
    assert begin == "ranks begin"
    assert events == [
        *("rank 0 writes 0", "rank 0 writes 1", "told of 0", "rank 0 writes 2", "told of 1"),
        "told of 2",  # its attention was added up for the row whose logits were wanted
    ]


@pytest.mark.parametrize("told", [True, False])
def test_the_last_layer_of_a_step_without_logits_waits_for_all_ranks(told: bool) -> None:
    events = Played().step(None, told=told)
    end = events.index("ranks have ended")
    assert events[end - (2 if told else 1)] == "rank 0 writes 2"
    assert events[end + 1 :] == (["told of 2"] if told else [])


def test_after_a_step_that_failed_nothing_can_be_computed() -> None:
    with pytest.raises(RunnerBroken):
        Played(fails=True).step(SPEC)


@pytest.mark.parametrize("allocated", [True, False])
def test_a_rank_asks_for_no_memory_that_the_service_has_not_allocated(allocated: bool) -> None:
    descriptor = os.memfd_create("pool")
    os.ftruncate(descriptor, 1 << 20)
    if allocated:
        os.posix_fallocate(descriptor, 0, 1 << 20)
    before = os.fstat(descriptor).st_blocks
    shape = (1, 16, 2, 2, 16, 256)
    kept = os.dup(descriptor)
    part = pool_part(shape, Shard(1, 2, cast(Collective, None)), torch.device("cpu"), torch.float32, descriptor)
    assert part.shape == (1, 16, 2, 1, 16, 256)
    assert os.fstat(kept).st_blocks == before
    os.close(kept)
