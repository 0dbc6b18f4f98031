"""What the receiver's engine hears of its grants."""

from __future__ import annotations

import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.protocol.errors import ServiceError
from tests.kvtransfer.conftest import StartEngine
from tests.kvtransfer.port import Port
from tests.kvtransfer.streams import Watching


async def test_the_life_of_a_grant(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    await receiver.grant("before", 0, 4, [9])
    watch = Watching(receiver.watch())
    await watch.until(lambda events: "before" in events)
    assert [batch.snapshot for batch in watch.batches] == [True]
    address = await receiver.grant("r", 0, 12, [4, 5, 6])
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_OPEN)
    push = sender.push(sender.order(address, 4, 12, [1, 2], ready_slot=0))
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_WRITING)
    sender.pool.raise_ready(0, 1)
    # Bytes are told of while nothing else changes, because they keep the lease alive.
    a_layer = 8 * receiver.shape.layer_token_bytes
    await watch.until(lambda events: events["r"].bytes == a_layer)
    sender.pool.raise_ready(0, 3)
    await push.done()
    await watch.until(lambda events: list(events["r"].committed) == [kv_pb2.TokenRange(begin=4, end=12)])
    assert watch.events["r"].state == pb.GRANT_STATE_OPEN
    await sender.push(sender.order(address, 0, 4, [1])).done()
    await watch.until(lambda events: list(events["r"].committed) == [kv_pb2.TokenRange(begin=0, end=12)])
    await watch.until(lambda events: events["r"].bytes == 3 * 12 * receiver.shape.layer_token_bytes)
    await receiver.revoke("r")
    await watch.until(lambda events: events["r"].state == pb.GRANT_STATE_DRAINED)
    assert list(watch.events["r"].committed) == [kv_pb2.TokenRange(begin=0, end=12)]
    assert [batch.snapshot for batch in watch.batches].count(True) == 1
    await watch.close()


async def test_a_snapshot_has_what_happened_before(start_engine: StartEngine) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")
    address = await receiver.grant("r", 0, 8, [4, 5])
    await receiver.grant("gone", 0, 4, [6])
    await receiver.revoke("gone")
    await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    watch = Watching(receiver.watch())
    await watch.until(lambda events: bool(watch.batches))
    (event,) = watch.batches[0].events
    assert (event.reservation_id, list(event.committed)) == ("r", [kv_pb2.TokenRange(begin=0, end=8)])
    await watch.close()


async def test_only_its_own_engine_may_watch(start_engine: StartEngine) -> None:
    engine = await start_engine("d")
    engine.incarnation = bytes(16)
    watch = Watching(engine.watch())
    with pytest.raises(ServiceError) as caught:
        await watch.until(lambda events: False)
    assert caught.value.reason == "STALE_INCARNATION"


async def test_each_pool_hears_of_its_own(start_engine: StartEngine) -> None:
    one, two = await start_engine("d"), await start_engine("e")
    watch = Watching(two.watch())
    await one.grant("r", 0, 4, [1])
    await two.grant("s", 0, 4, [1])
    await watch.until(lambda events: "s" in events)
    assert "r" not in watch.events
    await watch.close()


async def test_counters(port: Port, start_engine: StartEngine, transport: str) -> None:
    sender, receiver = await start_engine("p", seed=1), await start_engine("d")

    async def stats() -> tuple[pb.TransportStats, pb.PoolStats, pb.PoolStats]:
        reply, far = [await e.port.call("GetStats", pb.GetStatsRequest()) for e in (sender, receiver)]
        pools = {pool.pool_id: pool for pool in (*reply.pools, *far.pools)}
        (counters,) = [each for each in reply.transports if each.name == transport]
        return counters, pools[sender.pool_id], pools[receiver.pool_id]

    before, _, _ = await stats()
    address = await receiver.grant("r", 0, 8, [4, 5])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
    await push.opened()
    _, source, target = await stats()
    assert (source.push_count, target.grant_count, source.attached) == (1, 1, True)
    sender.pool.raise_ready(0, 3)
    moved = (await push.done()).bytes
    after, source, target = await stats()
    assert (source.sent_bytes, target.received_bytes, source.push_count) == (moved, moved, 0)
    assert after.push_count == before.push_count + 1
    assert after.bytes == before.bytes + moved
    assert after.failure_count == before.failure_count
    assert after.busy.ToNanoseconds() > before.busy.ToNanoseconds()
    # What a push moved before it failed counts too.
    address = await receiver.grant("s", 0, 8, [6, 7])
    push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=1))
    sender.pool.raise_ready(1, 1)
    await push.layers(1)
    await receiver.revoke("s")
    with pytest.raises(ServiceError):
        await push.done()
    failed, source, target = await stats()
    assert failed.failure_count == after.failure_count + 1
    assert source.sent_bytes == target.received_bytes == moved + moved // 3
    assert failed.bytes == after.bytes + moved // 3
