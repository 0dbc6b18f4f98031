"""The transports that pull, put together: what this service sends through and what it receives through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.landing import Landings
from services.kvtransfer.transports.base import Transport
from services.kvtransfer.transports.nixl import library
from services.kvtransfer.transports.nixl.poller import Poller
from services.kvtransfer.transports.nixl.sink import NixlSink
from services.kvtransfer.transports.nixl.source import NixlSource
from services.kvtransfer.transports.pull.client import PullClient
from services.kvtransfer.transports.pull.fetching import SinkSide
from services.kvtransfer.transports.pull.lane import PullTransport
from services.kvtransfer.transports.pull.session import PullSessions
from services.rpc.errors import StartError

# A receiver gives a sender up later than the sender gives up itself, so that the reason is the sender's.
_PATIENCE_FACTOR = 2
# The version of the offers and of what services say to each other over KvPeerService.
_NIXL_OFFER = "1"


class Pulling:
    """Belongs to the running loop. Close it after the last lane and the last session."""

    def __init__(self, config: KvTransferConfig, landings: Landings, epoch: bytes) -> None:
        """Raises StartError if a library that the options ask for is not there."""
        self._copiers = ThreadPoolExecutor(config.copy_threads, thread_name_prefix="pull-copy")
        self._client = PullClient(config.peer_tls)
        self._poller: Poller | None = None
        self.transports: tuple[Transport, ...] = ()
        sinks: dict[str, SinkSide] = {}
        if config.nixl_devices is not None:
            try:
                module = library.load(config.nixl_devices)
            except library.NixlMissing as error:
                raise StartError(f"--nixl-devices: {error}") from None
            poller = self._poller = Poller()

            def make_agent(name: str) -> library.Agent:
                return library.NixlAgent(module, name)

            sink = NixlSink(poller, make_agent, epoch, config.max_copy_bytes)
            sinks[sink.name] = sink
            source = NixlSource(poller, make_agent, epoch)
            self.transports += (PullTransport(source, self._client, epoch, _NIXL_OFFER),)
        patience_s = _PATIENCE_FACTOR * config.push_stall_timeout_s
        self.sessions = PullSessions(landings, sinks, self._copiers, config.max_copy_bytes, patience_s)

    async def close(self) -> None:
        """Ends threads and channels."""
        await self._client.close()
        self._copiers.shutdown()
        if self._poller is not None:
            self._poller.close()
