"""What is not granted is not written, and the answer says why."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.protocol.errors import Code, ServiceError
from tests.kvtransfer.conftest import StartEngine
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.port import Port

Change = Callable[[pb.PushRequest], Any]

WINDOW = (2, 14)
ORDERS: dict[str, tuple[Change, str]] = {
    "secret": (lambda o: setattr(o.target, "secret", os.urandom(16)), "WRONG_SECRET"),
    "no secret": (lambda o: setattr(o.target, "secret", b""), "WRONG_SECRET"),
    "epoch": (lambda o: setattr(o.target, "epoch", os.urandom(16)), "STALE_EPOCH"),
    "other service": (lambda o: _elsewhere(o), "PEER_UNREACHABLE"),
    "incarnation": (lambda o: setattr(o, "incarnation", os.urandom(16)), "STALE_INCARNATION"),
    "pool of another epoch": (lambda o: setattr(o, "pool_id", "0-1"), "STALE_EPOCH"),
    "pool": (lambda o: setattr(o, "pool_id", o.pool_id + "9999"), "UNKNOWN_POOL"),
    "target pool": (lambda o: _to_pool(o, "9999"), "RESERVATION_GONE"),
    "reservation": (lambda o: setattr(o.target, "reservation_id", "other"), "RESERVATION_GONE"),
    "no shard": (lambda o: o.target.ClearField("shards"), "LAYOUT_MISMATCH"),
    "half the layers": (lambda o: setattr(o.target.shards[0], "layer_end", 2), "LAYOUT_MISMATCH"),
    "half the heads": (lambda o: setattr(o.target.shards[0], "kv_head_begin", 1), "LAYOUT_MISMATCH"),
    "stated layout": (lambda o: setattr(o.target.layout, "head_dim", 8), "LAYOUT_MISMATCH"),
    "impossible layout": (lambda o: setattr(o.target.layout, "head_dim", 0), "LAYOUT_MISMATCH"),
    "source page beyond the pool": (lambda o: o.page_ids.__setitem__(0, 16), "INVALID_PAGES"),
    "too few source pages": (lambda o: o.page_ids.pop(), "INVALID_PAGES"),
    "too many source pages": (lambda o: o.page_ids.append(9), "INVALID_PAGES"),
    "a source page twice": (lambda o: o.page_ids.__setitem__(0, o.page_ids[1]), "INVALID_PAGES"),
    "other target pages": (lambda o: o.target.shards[0].page_ids.__setitem__(0, 0), "INVALID_PAGES"),
    "before the window": (lambda o: _move(o, 0, 8, [1, 2]), "OUTSIDE_WINDOW"),
    "after the window": (lambda o: _move(o, 8, 16, [1, 2]), "OUTSIDE_WINDOW"),
    "a wider window": (lambda o: setattr(o.target.window, "end", 16), "INVALID_REQUEST"),
    "nothing": (lambda o: _move(o, 4, 4, []), "INVALID_REQUEST"),
    "outside its attempt": (lambda o: setattr(o.attempt_range, "begin", 6), "INVALID_REQUEST"),
    "backwards": (lambda o: setattr(o.range, "begin", 13), "INVALID_RANGE"),
    "no attempt number": (lambda o: setattr(o, "attempt", 0), "INVALID_REQUEST"),
    "no writer": (lambda o: setattr(o, "writer_id", ""), "INVALID_REQUEST"),
    "ready slot": (lambda o: setattr(o, "ready_slot", 256), "INVALID_REQUEST"),
}


def _elsewhere(order: pb.PushRequest) -> None:
    order.target.epoch = os.urandom(16)
    order.target.endpoint = "127.0.0.1:1"


def _to_pool(order: pb.PushRequest, suffix: str) -> None:
    order.target.shards[0].pool_id += suffix


def _move(order: pb.PushRequest, begin: int, end: int, pages: list[int]) -> None:
    for field in (order.range, order.attempt_range):
        field.begin, field.end = begin, end
    order.page_ids[:] = pages


async def _refused(engine: FakeEngine, order: pb.PushRequest) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await engine.push(order).done()
    return caught.value


@pytest.mark.parametrize(("change", "reason"), ORDERS.values(), ids=[name.replace(" ", "_") for name in ORDERS])
async def test_a_wrong_push_writes_nothing(start_engine: StartEngine, change: Change, reason: str) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    before = receiver.memory.copy()
    address = await receiver.grant("r", *WINDOW, [4, 5, 6, 7])
    order = sender.order(address, 4, 12, [1, 2])
    change(order)
    error = await _refused(sender, order)
    assert error.reason == reason
    assert error.message
    np.testing.assert_array_equal(receiver.memory, before)
    # And the service goes on.
    await sender.push(sender.order(address, 4, 12, [1, 2])).done()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(layers=4),
        Shape(heads=1),
        Shape(head_dim=8),
        Shape(dtype=kv_pb2.DTYPE_FLOAT16),
        Shape(dtype=kv_pb2.DTYPE_FLOAT8_E4M3),
    ],
    ids=["layers", "heads", "head_dim", "dtype", "eight_bits"],
)
async def test_pools_of_other_layouts(start_engine: StartEngine, shape: Shape) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d", shape)
    pages = [4, 5, 6][: shape.page_count_of(0, 8)]
    address = await receiver.grant("r", 0, 8, pages)
    error = await _refused(sender, sender.order(address, 0, 8, [1, 2]))
    assert (error.code, error.reason) == (Code.FAILED_PRECONDITION, "LAYOUT_MISMATCH")
    assert (receiver.memory == receiver.memory[0]).all()


async def test_source_and_target_page_are_the_same(start_engine: StartEngine) -> None:
    engine = await start_engine("p", seed=1)
    address = await engine.grant("r", 0, 8, [1, 2])
    assert (await _refused(engine, engine.order(address, 0, 8, [2, 3]))).reason == "INVALID_PAGES"


async def test_overlapping_senders(start_engine: StartEngine) -> None:
    first, second, receiver = (
        await start_engine("p", seed=1),
        await start_engine("q", seed=2),
        await start_engine("d"),
    )
    address = await receiver.grant("r", 0, 16, [4, 5, 6, 7])
    push = first.push(first.order(address, 0, 8, [1, 2], ready_slot=0))
    await push.opened()
    live = await _refused(second, second.order(address, 6, 16, [1, 2, 3]))
    first.pool.raise_ready(0, 3)
    await push.done()
    committed = await _refused(second, second.order(address, 6, 16, [1, 2, 3]))
    assert {live.reason, committed.reason} == {"RANGE_OVERLAPS"}


async def test_another_engine_does_not_join_an_attempt(start_engine: StartEngine) -> None:
    """The same writer id at another engine is another writer."""
    first, second, receiver = (
        await start_engine("p", seed=1),
        await start_engine("q", seed=2),
        await start_engine("d"),
    )
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = first.push(first.order(address, 0, 8, [1, 2], ready_slot=0))
    await push.opened()
    assert (await _refused(second, second.order(address, 0, 8, [1, 2]))).reason == "ATTEMPT_SUPERSEDED"
    first.pool.raise_ready(0, 3)
    await push.done()


GRANTS: dict[str, tuple[dict[str, Any], str]] = {
    "too few pages": ({"page_ids": [1, 2]}, "INVALID_PAGES"),
    "too many pages": ({"page_ids": [1, 2, 3, 4]}, "INVALID_PAGES"),
    "page beyond the pool": ({"page_ids": [1, 2, 16]}, "INVALID_PAGES"),
    "a page twice": ({"page_ids": [1, 2, 1]}, "INVALID_PAGES"),
    "no window": ({"window": kv_pb2.TokenRange(begin=4, end=4), "page_ids": []}, "INVALID_RANGE"),
    "backwards": ({"window": kv_pb2.TokenRange(begin=12, end=4)}, "INVALID_RANGE"),
    "short secret": ({"secret": b"short"}, "INVALID_REQUEST"),
    "no reservation": ({"reservation_id": ""}, "INVALID_REQUEST"),
    "incarnation": ({"incarnation": b"x" * 16}, "STALE_INCARNATION"),
}


@pytest.mark.parametrize(("fields", "reason"), GRANTS.values(), ids=[name.replace(" ", "_") for name in GRANTS])
async def test_a_wrong_grant_opens_nothing(start_engine: StartEngine, fields: dict[str, Any], reason: str) -> None:
    engine = await start_engine("d")
    given: dict[str, Any] = {
        "pool_id": engine.pool_id,
        "incarnation": engine.incarnation,
        "reservation_id": "r",
        "secret": os.urandom(16),
        "window": kv_pb2.TokenRange(begin=0, end=12),
        "page_ids": [1, 2, 3],
    }
    with pytest.raises(ServiceError) as caught:
        await engine.port.call("Grant", pb.GrantRequest(**{**given, **fields}))
    assert caught.value.reason == reason
    # The pages are still free for another window.
    await engine.grant("other", 0, 12, [1, 2, 3])


async def test_the_same_grant_again(start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    address = await engine.grant("r", 0, 8, [1, 2])
    request = pb.GrantRequest(
        pool_id=engine.pool_id,
        incarnation=engine.incarnation,
        reservation_id="r",
        secret=address.secret,
        window=address.window,
        page_ids=[1, 2],
    )
    await engine.port.call("Grant", request)
    request.page_ids[:] = [1, 3]
    with pytest.raises(ServiceError) as caught:
        await engine.port.call("Grant", request)
    assert caught.value.reason == "GRANT_CONFLICT"
    with pytest.raises(ServiceError) as caught:
        await engine.grant("other", 0, 4, [2])
    assert caught.value.reason == "GRANT_CONFLICT"


async def test_refusals_are_counted(port: Port, start_engine: StartEngine) -> None:
    async def refused() -> int:
        count: int = (await port.call("GetStats", pb.GetStatsRequest())).refused_write_count
        return count

    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    before = await refused()
    address.secret = os.urandom(16)
    await _refused(sender, sender.order(address, 0, 8, [1, 2]))
    assert await refused() == before + 1
