"""Every byte arrives where it belongs, and no other byte changes."""

from __future__ import annotations

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from tests.kvtransfer.conftest import StartEngine
from tests.kvtransfer.engine import Shape
from tests.kvtransfer.oracle import expected

CASES = {
    "one whole page": (0, 4, [3], [7]),
    "neighbouring pages": (0, 16, [2, 3, 4, 5], [8, 9, 10, 11]),
    "scattered pages": (0, 16, [5, 1, 9, 0], [2, 15, 3, 8]),
    "neighbours on one side only": (0, 12, [4, 5, 6], [9, 7, 8]),
    "partial first page": (2, 8, [1, 2], [4, 5]),
    "partial last page": (4, 11, [1, 2], [4, 5]),
    "partial first and last": (3, 14, [6, 7, 8, 2], [1, 2, 3, 4]),
    "inside one page": (5, 7, [11], [12]),
    "one token": (6, 7, [0], [15]),
    "far into the prompt": (41, 51, [3, 2, 1], [1, 2, 3]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "_") for name in CASES])
async def test_pages_arrive(start_engine: StartEngine, case: tuple[int, int, list[int], list[int]]) -> None:
    begin, end, from_pages, to_pages = case
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", begin, end, to_pages)
    last = await sender.push(sender.order(address, begin, end, from_pages)).done()
    moved = (end - begin) * receiver.shape.layer_token_bytes * receiver.shape.layers
    assert (last.state, last.layers_done, last.bytes) == (pb.PUSH_STATE_COMMITTED, 3, moved)
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, begin, end, from_pages, to_pages))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        Shape(layers=1, heads=1, head_dim=1, page_size=1),
        Shape(layers=2, heads=3, head_dim=5, page_size=16, dtype=kv_pb2.DTYPE_BFLOAT16),
        Shape(layers=2, heads=3, head_dim=5, page_size=7, dtype=kv_pb2.DTYPE_FLOAT8_E4M3),
        Shape(layers=2, heads=8, head_dim=128, page_size=256, pages=4),
    ],
    ids=["smallest", "odd", "eight_bits", "page_larger_than_a_copy"],
)
async def test_layouts(start_engine: StartEngine, shape: Shape) -> None:
    sender, receiver = await start_engine("p", shape, seed=2), await start_engine("d", shape)
    begin, end = shape.page_size - 1, 3 * shape.page_size
    from_pages, to_pages = list(range(shape.pages))[-3:], [2, 0, 1]
    if shape.page_size == 1:
        begin, end = 0, 3
    before = receiver.memory.copy()
    address = await receiver.grant("r", begin, end, to_pages)
    await sender.push(sender.order(address, begin, end, from_pages)).done()
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, begin, end, from_pages, to_pages))


async def test_layer_by_layer(start_engine: StartEngine, transport: str) -> None:
    """With the sender held after layer k, layers 0..k are in place and the rest is untouched."""
    sender, receiver = await start_engine("p", seed=3), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 1, 10, [4, 5, 9])
    push = sender.push(sender.order(address, 1, 10, [1, 2, 3], ready_slot=5))
    await push.opened()
    np.testing.assert_array_equal(receiver.memory, before)
    for layers in range(1, 4):
        sender.pool.raise_ready(5, layers)
        await push.layers(layers)
        wanted = expected(before, receiver, sender, 1, 10, [1, 2, 3], [4, 5, 9], layers=layers)
        np.testing.assert_array_equal(receiver.memory, wanted)
    last = await push.done()
    assert last.transport == transport
    assert last.exposed.ToNanoseconds() > 0


async def test_many_layers_at_once(start_engine: StartEngine) -> None:
    """A counter that jumps, or is ahead of the push, moves everything."""
    sender, receiver = await start_engine("p", Shape(layers=40), seed=4), await start_engine("d", Shape(layers=40))
    sender.pool.raise_ready(0, 17)
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    await push.layers(17)
    # More than there are is all of them.
    sender.pool.raise_ready(0, 41)
    assert (await push.done()).layers_done == 40
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))


async def test_two_senders_with_disjoint_ranges(start_engine: StartEngine) -> None:
    first, second, receiver = (
        await start_engine("p", seed=5),
        await start_engine("q", seed=6),
        await start_engine("d"),
    )
    before = receiver.memory.copy()
    pages = [9, 3, 5, 6]
    address = await receiver.grant("r", 2, 15, pages)
    # They meet inside a page.
    one = first.push(first.order(address, 2, 7, [1, 2]))
    two = second.push(second.order(address, 7, 15, [1, 2, 3]))
    assert {(await one.done()).state, (await two.done()).state} == {pb.PUSH_STATE_COMMITTED}
    half = expected(before, receiver, first, 2, 7, [1, 2], pages)
    wanted = expected(half, receiver, second, 7, 15, [1, 2, 3], pages, window_begin=2)
    np.testing.assert_array_equal(receiver.memory, wanted)


async def test_chunks_of_one_attempt(start_engine: StartEngine) -> None:
    """The attempt is committed by the push that completes it, in whatever order they come."""
    sender, receiver = await start_engine("p", seed=7), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", 0, 12, [1, 2, 3])
    whole = kv_pb2.TokenRange(begin=0, end=12)
    parts = [(5, 12, [5, 6]), (0, 3, [4]), (3, 5, [4, 5])]
    states = []
    for begin, end, pages in parts:
        last = await sender.push(sender.order(address, begin, end, pages, attempt_range=whole)).done()
        states.append(last.state)
    assert states == [pb.PUSH_STATE_DONE, pb.PUSH_STATE_DONE, pb.PUSH_STATE_COMMITTED]
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 12, [4, 5, 6], [1, 2, 3]))


async def test_pushing_what_is_committed_moves_nothing(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=8), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [1, 2])
    order = sender.order(address, 0, 8, [5, 6])
    await sender.push(order).done()
    settled = receiver.memory.copy()
    sender.memory[:] = 0
    last = await sender.push(order).done()
    assert (last.state, last.bytes) == (pb.PUSH_STATE_COMMITTED, 0)
    np.testing.assert_array_equal(receiver.memory, settled)


async def test_within_one_pool(start_engine: StartEngine) -> None:
    engine = await start_engine("p", seed=9)
    before = engine.memory.copy()
    address = await engine.grant("r", 0, 8, [1, 2])
    await engine.push(engine.order(address, 0, 8, [5, 6])).done()
    np.testing.assert_array_equal(engine.memory, expected(before, engine, engine, 0, 8, [5, 6], [1, 2]))
