"""Calls of KvPeerService as the sending service makes them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc.aio
from microserve.kvtransfer.v1 import peer_pb2 as pb
from microserve.kvtransfer.v1 import peer_pb2_grpc as pb_grpc

from services.kvtransfer.convert import to_range
from services.kvtransfer.errors import KvTransferError
from services.kvtransfer.landing import Claim
from services.kvtransfer.transports.pull.fetching import Fetch
from services.kvtransfer.transports.pull.probing import PROBE_TIMEOUT_S
from services.kvtransfer.transports.pull.puller import PullState
from services.kvtransfer.transports.pull.session import (
    Answer,
    Checksums,
    Finished,
    Last,
    Opened,
    PullOpen,
    Ready,
    Said,
)
from services.protocol.address import KvAddress
from services.protocol.errors import ProtocolError, ServiceError
from services.rpc.channel import make_channel
from services.rpc.kv_messages import address_message, layout_message, range_message
from services.rpc.status import RemoteError, remote_errors
from services.rpc.tls import ClientTls

END_TIMEOUT_S = 10.0
# Channels that stay open; a peer that is met again gets a new one.
MAX_CHANNELS = 256

# What a peer refuses is what this service would have refused itself.
_KNOWN: dict[str, type[ServiceError]] = {
    error.reason: error for tree in (KvTransferError, ProtocolError) for error in tree.__subclasses__()
}


class PullClient:
    """A PullCaller over channels that are kept, one an endpoint. Belongs to the running loop; close it."""

    def __init__(self, tls: ClientTls | None) -> None:
        self._tls = tls
        # The one used longest ago first.
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._calls: Counter[str] = Counter()

    async def pull(self, endpoint: str, opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[Answer, None]:
        """See PullCaller.pull."""
        async with self._stub(endpoint) as stub:
            call = stub.Pull(_requests(opening, said))
            try:
                with _service_errors():
                    async for response in call:
                        yield _answer(response)
            finally:
                call.cancel()

    async def end(self, endpoint: str, address: KvAddress, claim: Claim) -> bool:
        """See PullCaller.end."""
        request = pb.EndPullRequest(
            target=address_message(address),
            attempt=claim.number,
            attempt_range=range_message(claim.range),
            writer_id=claim.writer_id,
        )
        async with self._stub(endpoint) as stub:
            with _service_errors():
                return (await stub.EndPull(request, timeout=END_TIMEOUT_S)).committed

    async def probe(self, endpoint: str, transport: str, offer: bytes) -> float:
        """See PullCaller.probe."""
        request = pb.ProbePullRequest(transport=transport, offer=offer)
        async with self._stub(endpoint) as stub:
            with _service_errors():
                reply = await stub.ProbePull(request, timeout=PROBE_TIMEOUT_S)
        return reply.bytes / max(reply.elapsed_us, 1) * 1e6

    async def close(self) -> None:
        """Closes every channel."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    @asynccontextmanager
    async def _stub(self, endpoint: str) -> AsyncGenerator[pb_grpc.KvPeerServiceAsyncStub, None]:
        if endpoint not in self._channels:
            self._channels[endpoint] = make_channel(endpoint, self._tls)
        self._channels.move_to_end(endpoint)
        self._calls[endpoint] += 1
        try:
            stub: pb_grpc.KvPeerServiceAsyncStub = pb_grpc.KvPeerServiceStub(self._channels[endpoint])
            yield stub
        finally:
            self._calls[endpoint] -= 1
            await self._close_some()

    async def _close_some(self) -> None:
        for endpoint in tuple(self._channels)[: max(0, len(self._channels) - MAX_CHANNELS)]:
            if not self._calls[endpoint]:
                del self._calls[endpoint]
                await self._channels.pop(endpoint).close()


@contextmanager
def _service_errors() -> Iterator[None]:
    """Inside, a call that fails raises the error of this service that has the peer's reason, else RemoteError."""
    try:
        with remote_errors():
            yield
    except RemoteError as error:
        known = _KNOWN.get(error.reason)
        if known is None:
            raise
        raise known(error.message, retry_delay_s=error.retry_delay_s) from None


async def _requests(opening: PullOpen, said: AsyncIterator[Said]) -> AsyncGenerator[pb.PullRequest, None]:
    yield pb.PullRequest(
        open=pb.PullOpen(
            target=address_message(opening.address),
            attempt=opening.claim.number,
            attempt_range=range_message(opening.claim.range),
            writer_id=opening.claim.writer_id,
            range=range_message(opening.part),
            source_layout=layout_message(opening.source.layout),
            source_page_count=opening.source.page_count,
            source_page_ids=opening.source_page_ids,
            transport=opening.transport,
            offer=opening.source.offer,
            checksums=opening.checksums,
        )
    )
    async for word in said:
        if isinstance(word, Ready):
            yield pb.PullRequest(ready=pb.PullReady(layer_end=word.layer_end))
        elif isinstance(word, Checksums):
            yield pb.PullRequest(checksums=pb.PullChecksums(layers=word.layers))
        elif word is Last.FINISH:
            yield pb.PullRequest(finish=pb.PullFinish())
        else:
            yield pb.PullRequest(leave=pb.PullLeave())


def _answer(response: pb.PullResponse) -> Answer:
    match response.WhichOneof("kind"):
        case "opened":
            return Opened(response.opened.committed, response.opened.checksums)
        case "fetch":
            return Fetch(response.fetch.layer, to_range(response.fetch.range))
        case "finished":
            return Finished(response.finished.committed)
        case _:
            progress = response.progress
            return PullState(progress.layers_done, progress.bytes, progress.busy_us / 1e6)
