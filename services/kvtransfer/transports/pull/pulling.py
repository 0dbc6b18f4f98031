"""The transports that pull, put together: what this service sends through and what it receives through."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.landing import Landings
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Transport
from services.kvtransfer.transports.cuda_ipc.gpu import Gpu
from services.kvtransfer.transports.nccl import communicator
from services.kvtransfer.transports.nccl import library as nccl
from services.kvtransfer.transports.nccl.buffers import Buffers
from services.kvtransfer.transports.nccl.communicator import Communicator, Patience
from services.kvtransfer.transports.nccl.link import Link
from services.kvtransfer.transports.nccl.sink import NcclSink
from services.kvtransfer.transports.nccl.source import NcclSource
from services.kvtransfer.transports.nixl import library as nixl
from services.kvtransfer.transports.nixl.poller import Poller
from services.kvtransfer.transports.nixl.sink import NixlSink
from services.kvtransfer.transports.nixl.source import NixlSource
from services.kvtransfer.transports.pull.client import PullClient
from services.kvtransfer.transports.pull.fetching import SinkSide, SourceSide
from services.kvtransfer.transports.pull.lane import PullTransport
from services.kvtransfer.transports.pull.probing import PROBE_BUFFERS, PullProbes, make_probe_memory
from services.kvtransfer.transports.pull.session import PullSessions
from services.rpc.errors import StartError

# A receiver gives a sender up later than the sender gives up itself, so that the reason is the sender's.
_PATIENCE_FACTOR = 2
# The version of the offers and of what services say to each other over KvPeerService.
_NIXL_OFFER = "2"
_NCCL_OFFER = "2"
# Between two looks at a communicator.
_PAUSE_S = 0.0002
_PROBE = b"probe"  # behind the epoch in the name of the agent that probes


class Pulling:
    """Belongs to the running loop. Close it after the last lane and the last session."""

    def __init__(self, config: KvTransferConfig, landings: Landings, epoch: bytes, gpu: Gpu | None) -> None:
        """Raises StartError if a library that the options ask for is not there."""
        self._copiers = ThreadPoolExecutor(config.copy_threads, thread_name_prefix="pull-copy")
        self._client = PullClient(config.peer_tls)
        self._closing = AsyncExitStack()
        self._closing.push_async_callback(self._client.close)
        self._epoch = epoch
        self._checksums = config.checksums
        self.transports: tuple[Transport, ...] = ()
        self._sinks: dict[str, SinkSide] = {}
        self._probed: dict[str, SinkSide] = {}
        self._probe_memory: Pool | None = None
        if config.nccl_library is not None and gpu is not None:
            self._add_nccl(config, config.nccl_library, gpu)
        if config.nixl_devices is not None:
            self._add_nixl(config, config.nixl_devices)
        patience_s = _PATIENCE_FACTOR * config.push_stall_timeout_s
        self.sessions = PullSessions(
            landings, self._sinks, self._copiers, config.max_copy_bytes, patience_s, checksums=config.checksums
        )
        self.probes = PullProbes(self._probed, self._probe_memory, self._copiers, config.max_copy_bytes)

    async def close(self) -> None:
        """Ends threads and channels."""
        await self._closing.aclose()
        self._copiers.shutdown()

    def _add(self, source: SourceSide, sink: SinkSide, offer: str, probe_memory: Pool | None = None) -> None:
        transport = PullTransport(source, self._client, self._epoch, offer, probe_memory, checksums=self._checksums)
        self.transports += (transport,)
        self._sinks[sink.name] = sink

    def _add_nixl(self, config: KvTransferConfig, devices: str) -> None:
        try:
            module = nixl.load(devices)
        except nixl.NixlMissing as error:
            raise StartError(f"--nixl-devices: {error}") from None
        poller = Poller()
        self._closing.callback(poller.close)

        def make_agent(name: str) -> nixl.Agent:
            return nixl.NixlAgent(module, name)

        sink = NixlSink(poller, make_agent, self._epoch, config.max_copy_bytes)
        self._probe_memory = make_probe_memory()
        assert self._probe_memory.memory is not None
        self._closing.callback(self._probe_memory.memory.close)
        self._add(NixlSource(poller, make_agent, self._epoch), sink, _NIXL_OFFER, self._probe_memory)
        # Who probes shows no secret: peers and buffers of pushes are out of reach from there.
        name, num_bytes = self._epoch + _PROBE, config.max_copy_bytes
        self._probed[sink.name] = NixlSink(poller, make_agent, name, num_bytes, PROBE_BUFFERS)

    def _add_nccl(self, config: KvTransferConfig, setting: str, gpu: Gpu) -> None:
        try:
            path = nccl.find(setting)
            build = nccl.read_build(path)
            nccl.check_build(build, gpu.driver.cuda_major)
            library = nccl.NcclLibrary(path)
        except nccl.NcclMissing as error:
            raise StartError(f"--nccl-library: {error}") from None

        def make_link(unique_id: bytes, rank: int) -> Link:
            def connect(stopped: threading.Event) -> Communicator:
                patience = Patience(time.monotonic, lambda: time.sleep(_PAUSE_S), config.nccl_timeout_s)
                return communicator.connect(library, gpu.device, unique_id, rank, patience, stopped)

            return Link(unique_id, connect)

        sink = NcclSink(Buffers(gpu.device, config.max_copy_bytes), gpu.copier, gpu.staging, make_link)
        source = NcclSource(Buffers(gpu.device, config.max_copy_bytes), gpu.staging, library.unique_id, make_link)
        self._closing.push_async_callback(sink.close)
        self._closing.push_async_callback(source.close)
        # NCCL refuses to pair two versions, so services of two versions do not try.
        self._add(source, sink, f"{_NCCL_OFFER} {build}")
