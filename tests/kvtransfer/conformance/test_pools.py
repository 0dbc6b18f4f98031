"""Making, attaching, losing and taking back pools."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.protocol.errors import Code, ServiceError
from services.rpc.pool_client import PoolAttachError, adopt, attach_pool
from tests.kvtransfer.conftest import StartEngine
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.port import Port


async def _reason(engine: FakeEngine, **fields: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        await engine.create(**fields)
    return caught.value.reason


@pytest.mark.parametrize(
    "fields",
    [
        {"page_count": 0},
        {"engine_name": ""},
        {"engine_name": "x" * 129},
        {"engine_name": "a b"},
        {"layout": Shape(layers=0).layout()},
        {"layout": Shape(dtype=0).layout()},
    ],
    ids=["no_pages", "no_name", "long_name", "space", "no_layers", "no_dtype"],
)
async def test_impossible_pools(port: Port, fields: dict[str, Any]) -> None:
    assert await _reason(FakeEngine(port, "impossible"), **fields) == "INVALID_POOL"


async def test_a_pool_beyond_the_limit(port: Port) -> None:
    with pytest.raises(ServiceError) as caught:
        await FakeEngine(port, "huge").create(page_count=2**32 - 1, layout=Shape(heads=64, head_dim=256).layout())
    assert (caught.value.code, caught.value.reason) == (Code.RESOURCE_EXHAUSTED, "NO_MEMORY")


async def test_the_pool_of_a_live_engine(start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    assert await _reason(engine) == "POOL_IN_USE"
    with pytest.raises(ServiceError) as caught:
        await engine.invitation()
    assert caught.value.reason == "POOL_IN_USE"


async def test_another_layout_replaces_the_pool(start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    first = engine.pool_id
    engine.close()
    engine.shape = replace(engine.shape, pages=8)
    await engine.create()
    assert engine.pool_id != first
    with pytest.raises(ServiceError) as caught:
        await engine.port.call("AttachPool", pb.AttachPoolRequest(pool_id=first, incarnation=bytes(16)))
    assert caught.value.reason == "UNKNOWN_POOL"


async def test_a_ticket_is_good_once(port: Port) -> None:
    engine = FakeEngine(port, "ticket")
    await engine.create()
    invitation = await engine.invitation()
    pool = await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket)
    with pytest.raises(PoolAttachError):
        await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket)
    with pytest.raises(PoolAttachError):
        await asyncio.to_thread(attach_pool, invitation.socket_path, os.urandom(32))
    assert not pool.service_is_gone()
    pool.close()


async def test_a_later_invitation_withdraws_the_earlier(port: Port) -> None:
    engine = FakeEngine(port, "invited-twice")
    await engine.create()
    first, second = await engine.invitation(), await engine.invitation()
    with pytest.raises(PoolAttachError):
        await asyncio.to_thread(attach_pool, first.socket_path, first.ticket)
    pool = await asyncio.to_thread(attach_pool, second.socket_path, second.ticket)
    pool.close()


async def test_before_the_handover_the_engine_has_no_pool(port: Port) -> None:
    engine = FakeEngine(port, "not-yet")
    await engine.create()
    await engine.invitation()
    with pytest.raises(ServiceError) as caught:
        await engine.grant("r", 0, 4, [1])
    assert caught.value.reason == "STALE_INCARNATION"


async def test_the_memory_is_sealed(start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    for descriptor in engine.pool.descriptors[:2]:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)


async def test_every_page_is_its_own(start_engine: StartEngine) -> None:
    """The arithmetic of the layout covers the pool exactly."""
    engine = await start_engine("d")
    shape = engine.shape
    assert len(engine.memory) == shape.layers * shape.pages * shape.page_size * shape.layer_token_bytes
    assert engine.tokens.size == len(engine.memory)
    assert np.shares_memory(engine.tokens, engine.memory)


async def test_adopting_what_was_not_asked_for(port: Port, start_engine: StartEngine) -> None:
    """Descriptors that come with a ticket for a pool the service has are refused."""
    engine = await start_engine("d")
    other = FakeEngine(port, "has-one-already")
    await other.create()
    invitation = await other.invitation()
    with pytest.raises(PoolAttachError):
        await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)


async def test_adopting_memory_of_another_size(port: Port, start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    other = FakeEngine(port, "adopts-too-little", Shape(pages=99))
    await other.create(adopt=True)
    invitation = await other.invitation()
    with pytest.raises(PoolAttachError):
        await asyncio.to_thread(adopt, engine.pool, invitation.socket_path, invitation.ticket)
    # The engine keeps the pool that it has.
    await engine.grant("r", 0, 4, [1])
