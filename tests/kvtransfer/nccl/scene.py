"""Two services of this process and NCCL between them. Only the library and the GPU are fakes; time is real, because
nothing waits for a deadline but where a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.kvtransfer.convert import to_address
from services.kvtransfer.landing import Claim, Landings
from services.kvtransfer.transports.base import Peer, PutRequest
from services.kvtransfer.transports.cuda_ipc.copies import RunCopier
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from services.kvtransfer.transports.nccl import communicator
from services.kvtransfer.transports.nccl.buffers import Buffers
from services.kvtransfer.transports.nccl.communicator import Communicator, Patience
from services.kvtransfer.transports.nccl.link import Link
from services.kvtransfer.transports.nccl.sink import NcclSink
from services.kvtransfer.transports.nccl.source import NcclSource
from services.kvtransfer.transports.pull.lane import PullLane, PullTransport
from services.kvtransfer.transports.pull.session import Answer, PullOpen, PullSessions, Said
from services.protocol.address import KvAddress
from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from tests.kvtransfer.cuda.fake_device import FakeDevice
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.nccl.fake_nccl import FakeNccl
from tests.kvtransfer.port import PATIENCE_S, DirectPort

PAGES, TARGET = [1, 2], [4, 5]
BUFFER_BYTES = 1 << 16


class Caller:
    """A PullCaller that hands a stream to the receiver's sessions without a wire."""

    def __init__(self, sessions: PullSessions) -> None:
        self._sessions = sessions

    async def pull(self, endpoint: str, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        stream = self._sessions.serve(opening, said)
        try:
            async for answer in stream:
                yield answer
        finally:
            await stream.aclose()

    async def end(self, endpoint: str, address: KvAddress, claim: Claim) -> bool:
        return await self._sessions.end(address, claim)


class Scene:
    """A sender's service and a receiver's."""

    def __init__(self, near: DirectPort, far: DirectPort, sender: FakeEngine, receiver: FakeEngine) -> None:
        self.sender, self.receiver = sender, receiver
        self.device = FakeDevice()
        self.nccl = FakeNccl(self.device)
        self.timeout_s = PATIENCE_S
        self.changed = asyncio.Event()
        self.source_pool = near.service._pools.find(sender.pool_id)
        self.before = receiver.memory.copy()
        buffers, staging = Buffers(self.device, BUFFER_BYTES), Staging(self.device, 100)
        self.source = NcclSource(buffers, staging, self.nccl.unique_id, self._link)
        copier = RunCopier(self.device, 2, None)
        self.received = Buffers(self.device, BUFFER_BYTES)
        self.sink = NcclSink(self.received, copier, staging, self._link)
        self.copiers = ThreadPoolExecutor(2)
        landings = Landings(far.service._gate, far.service._pools.find)
        # A buffer's worth at a time, so that a layer takes several sends.
        sessions = PullSessions(landings, {"nccl": self.sink}, self.copiers, 256, PATIENCE_S)
        caller = Caller(sessions)
        self.transport = PullTransport(self.source, caller, b"near", "nccl 2.30.0")
        self.checked = PullTransport(self.source, caller, b"near", "nccl 2.30.0", checksums=True)

    async def open(
        self, reservation: str = "r", attempt: int = 1, *, checksums: bool = False, endpoint: str = "far:1"
    ) -> PullLane:
        target = [4, 5] if reservation != "other" else [6, 7]
        address = to_address(await self.receiver.grant(reservation, 0, 8, target))
        part = TokenRange(0, 8)
        request = PutRequest(
            Peer(endpoint, b"far", {"nccl": "nccl 2.30.0"}),
            self.source_pool,
            tuple(PAGES),
            part,
            address,
            Claim(part, attempt, "w"),
        )
        transport = self.checked if checksums else self.transport
        lane = await transport.open(request, self.changed.set)
        assert isinstance(lane, PullLane)
        return lane

    async def layers(self, lane: PullLane, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.changed.clear()
                if lane.check().layers_done >= count:
                    return
                await self.changed.wait()

    async def fails(self, lane: PullLane) -> ServiceError:
        with pytest.raises(ServiceError) as caught:
            await self.layers(lane, 99)
        return caught.value

    async def succeeds(self, name: str) -> None:
        """A push of that name goes through, whole."""
        lane = await self.open(name)
        lane.post(3)
        await self.layers(lane, 3)
        assert await lane.finish() is True
        await lane.close()

    def _link(self, unique_id: bytes, rank: int) -> Link:
        clock, timeout_s = asyncio.get_running_loop().time, self.timeout_s

        def connect(stopped: threading.Event) -> Communicator:
            patience = Patience(clock, lambda: stopped.wait(0.0005) and None, timeout_s)
            return communicator.connect(self.nccl, self.device, unique_id, rank, patience, stopped)

        return Link(unique_id, connect)
