"""Between engines that arrange their KV differently: page size, order of axes, split over ranks."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.protocol.errors import ServiceError
from tests.kvtransfer.conftest import WAYS, StartEngine
from tests.kvtransfer.engine import Shape
from tests.kvtransfer.nixl.installed import needs_nixl
from tests.kvtransfer.ranks import RankedEngine, Split, expected, shapes_of
from tests.kvtransfer.streams import Watching

MODEL = Shape(layers=3, heads=4, head_dim=2, page_size=4, pages=16)
WHOLE: Split = [((0, 3), (0, 4))]
HALVES: Split = [((0, 3), (0, 2)), ((0, 3), (2, 4))]
UNEVEN: Split = [((0, 3), (0, 1)), ((0, 3), (1, 4))]
BY_LAYER: Split = [((0, 2), (0, 4)), ((2, 3), (0, 4))]
SPLITS = {
    "1 to 1": (WHOLE, WHOLE),
    "1 to 2": (WHOLE, HALVES),
    "2 to 1": (HALVES, WHOLE),
    "2 to 2": (HALVES, HALVES),
    "2 to other 2": (HALVES, UNEVEN),
    "layers to heads": (BY_LAYER, HALVES),
    "1 to layers": (WHOLE, BY_LAYER),
}
ORDERS = {
    "same order": (kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM, kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM),
    "keys transposed": (kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM, kv_pb2.PAGE_ORDER_K_HEAD_DIM_TOKEN),
    "tokens first": (kv_pb2.PAGE_ORDER_KV_TOKEN_HEAD_DIM, kv_pb2.PAGE_ORDER_KV_HEAD_TOKEN_DIM),
}
# (page size of the sender, of the receiver): equal, divisible either way, and neither.
PAGE_SIZES = [(4, 4), (2, 8), (8, 2), (3, 5)]

StartRanks = Callable[..., Awaitable[RankedEngine]]


@pytest.fixture(params=[*WAYS, pytest.param("nixl and tcp-grpc", marks=needs_nixl)])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """NIXL moves between equal arrangements only: the rest is left to tcp, where there are both."""
    transport, _, how = request.param.partition("-")
    return transport, how


@pytest.fixture
def start_ranks(start_engine: StartEngine) -> StartRanks:
    """`await start_ranks("d", model, split, seed=...)`: an engine of several ranks."""

    async def start(name: str, model: Shape, split: Split, *, seed: int | None = None) -> RankedEngine:
        incarnation = os.urandom(16)
        ranks = [
            await start_engine(f"{name}{i}", shape, seed=None if seed is None else seed + i, incarnation=incarnation)
            for i, shape in enumerate(shapes_of(model, split))
        ]
        return RankedEngine(model, ranks)

    return start


def pages_of(engine: RankedEngine, begin: int, end: int, seed: int) -> list[list[int]]:
    """Pages for a range in every rank, in no order and other ones in each."""
    random = np.random.default_rng(seed)
    count = engine.model.page_count_of(begin, end)
    return [random.permutation(engine.model.pages)[:count].tolist() for _ in engine.ranks]


@pytest.mark.parametrize("order", ORDERS.values(), ids=[name.replace(" ", "_") for name in ORDERS])
@pytest.mark.parametrize("page_sizes", PAGE_SIZES, ids=[f"{a}_to_{b}" for a, b in PAGE_SIZES])
@pytest.mark.parametrize("split", SPLITS.values(), ids=[name.replace(" ", "_") for name in SPLITS])
async def test_every_value_finds_its_place(
    start_ranks: StartRanks, split: tuple[Split, Split], page_sizes: tuple[int, int], order: tuple[int, int]
) -> None:
    begin, end = 5, 18
    models = [replace(MODEL, page_size=size, order=kind) for size, kind in zip(page_sizes, order, strict=True)]
    sender = await start_ranks("p", models[0], split[0], seed=1)
    receiver = await start_ranks("d", models[1], split[1])
    from_pages, to_pages = pages_of(sender, begin, end, 1), pages_of(receiver, begin, end, 2)
    before = receiver.memories()
    address = await receiver.grant("r", begin, end, to_pages)
    pushes = [sender.push(rank, address, begin, end, pages) for rank, pages in enumerate(from_pages)]
    last = [await push.done() for push in pushes]
    committed = [message.state == pb.PUSH_STATE_COMMITTED for message in last]
    assert sum(committed) == 1, "the rank that comes last commits"
    assert sum(message.bytes for message in last) == (end - begin) * MODEL.layers * MODEL.layer_token_bytes
    wanted = expected(sender, from_pages, receiver, before, to_pages, begin, end)
    for rank, memory in enumerate(receiver.memories()):
        np.testing.assert_array_equal(memory, wanted[rank])


async def test_nothing_counts_before_every_rank_has_sent(start_ranks: StartRanks) -> None:
    sender, receiver = await start_ranks("p", MODEL, HALVES, seed=1), await start_ranks("d", MODEL, UNEVEN)
    address = await receiver.grant("r", 0, 8, [[4, 5], [6, 7]])
    watching = Watching(receiver.ranks[0].watch())
    first = await sender.push(0, address, 0, 8, [1, 2]).done()
    assert first.state == pb.PUSH_STATE_DONE
    # The other rank comes in two pieces: half of the tokens are not enough either.
    piece = {"attempt_range": kv_pb2.TokenRange(begin=0, end=8)}
    second = await sender.push(1, address, 0, 6, [1, 2], **piece).done()
    assert second.state == pb.PUSH_STATE_DONE
    assert not watching.events["r"].committed
    third = await sender.push(1, address, 6, 8, [2], **piece).done()
    assert third.state == pb.PUSH_STATE_COMMITTED
    await watching.until(lambda events: [(r.begin, r.end) for r in events["r"].committed] == [(0, 8)])
    await watching.close()


async def test_a_revoke_closes_every_pool(start_ranks: StartRanks) -> None:
    sender, receiver = await start_ranks("p", MODEL, WHOLE, seed=1), await start_ranks("d", MODEL, HALVES)
    address = await receiver.grant("r", 0, 8, [[4, 5], [6, 7]])
    push = sender.push(0, address, 0, 8, [1, 2], ready_slot=0)
    await push.opened()
    await receiver.ranks[0].revoke("r")
    after = receiver.memories()
    await refused(push.done(), "RESERVATION_GONE")
    for memory, kept in zip(receiver.memories(), after, strict=True):
        np.testing.assert_array_equal(memory, kept)
    # The pages of both are free for another window.
    await receiver.grant("s", 0, 8, [[4, 5], [6, 7]])


async def test_the_death_of_one_rank_ends_the_grant(start_ranks: StartRanks) -> None:
    sender, receiver = await start_ranks("p", MODEL, WHOLE, seed=1), await start_ranks("d", MODEL, HALVES)
    address = await receiver.grant("r", 0, 8, [[4, 5], [6, 7]])
    push = sender.push(0, address, 0, 8, [1, 2], ready_slot=0)
    await push.opened()
    receiver.ranks[1].close()
    await refused(push.done(), "RESERVATION_GONE")


async def test_pools_that_are_no_whole_model(start_ranks: StartRanks) -> None:
    halves = await start_ranks("d", MODEL, HALVES)
    one = RankedEngine(MODEL, halves.ranks[:1])
    await refused(one.grant("r", 0, 8, [[4, 5]]), "LAYOUT_MISMATCH")
    twice = RankedEngine(MODEL, [*halves.ranks, halves.ranks[0]])
    await refused(twice.grant("r", 0, 8, [[4, 5], [6, 7], [8, 9]]), "GRANT_CONFLICT")
    await refused(halves.grant("r", 0, 8, [[4, 5], [6, 16]]), "INVALID_PAGES")
    stranger = await start_ranks("e", MODEL, HALVES)
    mixed = RankedEngine(MODEL, [halves.ranks[0], stranger.ranks[1]])
    await refused(mixed.grant("r", 0, 8, [[4, 5], [6, 7]]), "STALE_INCARNATION")
    await halves.grant("r", 0, 8, [[4, 5], [6, 7]])


async def test_an_address_that_swaps_its_pools(start_ranks: StartRanks) -> None:
    """The heads of one rank cannot be sent into the pool of another."""
    sender, receiver = await start_ranks("p", MODEL, WHOLE, seed=1), await start_ranks("d", MODEL, HALVES)
    before = receiver.memories()
    address = await receiver.grant("r", 0, 8, [[4, 5], [6, 7]])
    first, second = address.shards
    first.kv_head_begin, first.kv_head_end, second.kv_head_begin, second.kv_head_end = 2, 4, 0, 2
    await refused(sender.push(0, address, 0, 8, [1, 2]).done(), "LAYOUT_MISMATCH")
    del address.shards[1]
    await refused(sender.push(0, address, 0, 8, [1, 2]).done(), "LAYOUT_MISMATCH")
    for memory, kept in zip(receiver.memories(), before, strict=True):
        np.testing.assert_array_equal(memory, kept)


async def test_a_part_that_no_model_has(start_engine: StartEngine) -> None:
    beyond = replace(MODEL, heads=2, first_head=3, model_layers=3, model_heads=4)
    await refused(start_engine("d", beyond), "INVALID_POOL")


async def refused(work: Awaitable[object], reason: str) -> None:
    with pytest.raises(ServiceError) as caught:
        await work
    assert caught.value.reason == reason
