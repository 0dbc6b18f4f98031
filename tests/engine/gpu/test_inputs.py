"""What a step is sent, in one copy, equals what the plain runner sends."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from services.engine.core.plan import SampleSpec, Segment
from services.engine.core.runner import make_batch
from services.engine.gpu.graphs import sizes_to
from services.engine.gpu.inputs import StepInputs
from services.engine.gpu.packing import Packer
from services.engine.sampling.params import SamplingParams

CPU = torch.device("cpu")
SAMPLE = SampleSpec(SamplingParams(), [1], 1)
FIELDS = ("token_ids", "positions", "slots", "query_starts", "context_lengths", "block_tables", "logits_rows")


def segments() -> list[Segment]:
    return [
        Segment(1, 6, [10, 11, 12], array("i", [7, 3, 5]), None),
        Segment(2, 4, [20], array("i", [9, 1]), SAMPLE),
        Segment(3, 0, [30, 31], array("i", [2]), SAMPLE),
    ]


def test_the_same_batch_as_the_plain_runner() -> None:
    packer = Packer()
    inputs = StepInputs(packer, segments(), 4, {})
    actual, expected = inputs.batch(packer.send(CPU), torch.zeros(1, dtype=torch.int64)), make_batch(segments(), 4, CPU)
    for name in FIELDS:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours.dtype, ours.tolist()) == (theirs.dtype, theirs.tolist()), name
    assert actual.contexts is not None
    assert actual.contexts.tolist() == expected.context_lengths.tolist()


def test_a_token_of_the_step_before_is_filled_in() -> None:
    packer = Packer()
    follows = Segment(2, 4, [], array("i", [9, 1]), SAMPLE, follows=True)
    inputs = StepInputs(packer, [segments()[0], follows, segments()[2]], 4, {2: 1, 5: 0})
    batch = inputs.batch(packer.send(CPU), torch.tensor([70, 71]))
    assert batch.token_ids.tolist() == [10, 11, 12, 71, 30, 31]
    assert batch.positions.tolist() == [6, 7, 8, 4, 0, 1]


def test_padding_repeats_the_first_row_and_its_choice_is_nobodys() -> None:
    packer = Packer()
    follows = [Segment(n, 4 + n, [], array("i", [9, n]), SAMPLE, follows=True) for n in (1, 2)]
    batch = StepInputs(packer, follows, 4, {1: 0, 2: 1}, pad_to=4).batch(packer.send(CPU), torch.tensor([70, 71]))
    assert batch.token_ids.tolist() == [70, 71, 70, 70]
    assert batch.slots.tolist() == [5, 10, 5, 5]
    assert batch.block_tables.tolist() == [[9, 1], [9, 2], [9, 1], [9, 1]]
    assert batch.logits_rows.tolist() == [0, 1]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 20, 64])
def test_every_batch_has_a_size_that_is_little_larger(most: int) -> None:
    sizes = sizes_to(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        assert min(size for size in sizes if size >= rows) - rows < 8


def test_arrays_of_all_kinds_in_one_copy() -> None:
    packer = Packer()
    arrays = [np.arange(3), np.array([[0.5, np.inf]]), np.arange(11, dtype=np.uint8).reshape(1, 11), np.zeros((0, 2))]
    places = [packer.add(each) for each in arrays]
    packed = packer.send(CPU)
    for place, each in zip(places, arrays, strict=True):
        assert packed[place].shape == each.shape
        assert np.array_equal(packed[place].numpy(), each)
