"""The service runs out of descriptors or of memory: whoever asks then is refused, everybody else goes on."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.protocol.errors import ServiceError
from services.rpc.pool_client import PoolAttachError, attach_pool
from tests.kvtransfer.engine import FakeEngine, Shape
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.process import ServiceProcess
from tests.kvtransfer.test_process import connected, start_service

pytestmark = pytest.mark.slow

__all__ = ["start_service"]


@contextmanager
def limited(service: ServiceProcess, kind: int, soft: int) -> Iterator[None]:
    """Inside, the process has this limit."""
    before = resource.prlimit(service.child.pid, kind)
    resource.prlimit(service.child.pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(service.child.pid, kind, before)


def lowest_free(service: ServiceProcess) -> int:
    """The descriptor that the process would be given next; with this as its limit it is given none."""
    used = {int(name) for name in os.listdir(f"/proc/{service.child.pid}/fd")}
    return min(set(range(len(used) + 1)) - used)


def cpu_seconds(service: ServiceProcess) -> float:
    with open(f"/proc/{service.child.pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def mapped_bytes(service: ServiceProcess) -> int:
    with open(f"/proc/{service.child.pid}/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


async def a_transfer_works(sender: FakeEngine, receiver: FakeEngine, reservation: str) -> None:
    before = receiver.memory.copy()
    address = await receiver.grant(reservation, 0, 8, [4, 5])
    assert (await sender.push(sender.order(address, 0, 8, [1, 2])).done()).state == pb.PUSH_STATE_COMMITTED
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 8, [1, 2], [4, 5]))


async def test_no_descriptor_is_left(start_service: type[ServiceProcess]) -> None:
    service = start_service()
    async with connected(service, "p", "d") as (port, (sender, receiver)):
        late = FakeEngine(port, "late")
        with limited(service, resource.RLIMIT_NOFILE, lowest_free(service)):
            with pytest.raises(ServiceError) as caught:
                await late.create()
            assert caught.value.reason == "NO_MEMORY"
            await a_transfer_works(sender, receiver, "while short")
        await late.create()
        with limited(service, resource.RLIMIT_NOFILE, lowest_free(service)):
            invitation = await late.invitation()
            # It comes with a good ticket and cannot be let in.
            used = cpu_seconds(service)
            with pytest.raises(PoolAttachError, match="timed out"):
                await asyncio.to_thread(attach_pool, invitation.socket_path, invitation.ticket, timeout_s=1)
            # A service that is told of the same caller again and again would have used all of that second.
            assert cpu_seconds(service) - used < 0.5
            await a_transfer_works(sender, receiver, "while shut")
        await late.attach()
        late.close()


async def test_no_memory_is_left(start_service: type[ServiceProcess]) -> None:
    service = start_service()
    async with connected(service, "p", "d") as (port, (sender, receiver)):
        large = FakeEngine(port, "large", Shape(pages=4096, heads=8, head_dim=64))
        with limited(service, resource.RLIMIT_AS, mapped_bytes(service) + 2**26):
            with pytest.raises(ServiceError) as caught:
                await large.create()
            assert caught.value.reason == "NO_MEMORY"
            await a_transfer_works(sender, receiver, "while short")
        await large.create()
