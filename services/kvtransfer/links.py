"""The services that this one sends to: what each told of itself, and which transport is used to it and why."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.kvtransfer.errors import NoTransport, TransportFailed
from services.kvtransfer.landing import Claim
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Peer, Reach, Transport
from services.protocol.address import KvAddress
from services.protocol.errors import StaleEpoch

log = logging.getLogger(__name__)

# Peers that are remembered; a forgotten one is asked again.
MAX_PEERS = 1_024
# How long a transport that could not be set up is tried last.
_AVOID_S = 30.0
_NEAREST_FIRST = tuple(Reach)


@dataclass(slots=True)
class Link:
    """What is known of the way to one peer."""

    peer: Peer
    bytes_per_second: dict[str, float] = field(default_factory=dict)  # by transport, as probed when they met
    transport: str = ""  # in use; "" before the first push
    fallbacks: int = 0
    last_fallback: str = ""  # why, for people
    avoid_until_s: dict[str, float] = field(default_factory=dict)


class Links:
    """Belongs to the running loop. `transports` best first; `ask` fetches what a service tells of itself, and raises
    PeerUnreachable, and NoTransport for one of another version."""

    def __init__(
        self,
        transports: Sequence[Transport],
        epoch: bytes,
        endpoint: Callable[[], str],
        ask: Callable[[str], Awaitable[Peer]],
    ) -> None:
        self.transports = tuple(transports)
        self._epoch = epoch
        self._endpoint = endpoint
        self._ask = ask
        self._links: OrderedDict[str, Link] = OrderedDict()
        self._meeting: dict[str, asyncio.Task[Link]] = {}
        self._loop = asyncio.get_running_loop()
        self.unroutable = 0

    def own(self) -> Peer:
        """This service as others see it."""
        offers = {transport.capabilities.name: transport.offer() for transport in self.transports}
        known = {name: offer for name, offer in offers.items() if offer is not None}
        return Peer(self._endpoint(), self._epoch, known)

    def all(self) -> tuple[Link, ...]:
        """The links, the one used longest ago first; any thread."""
        return tuple(self._links.values())

    async def peer(self, address: KvAddress) -> Peer:
        """The service that the address names; one that is not known yet is asked first.

        Raises PeerUnreachable, NoTransport for one of another version, and StaleEpoch if it restarted since the
        address was made.
        """
        if address.epoch == self._epoch:
            return self.own()
        link = self._links.get(address.endpoint)
        if link is None or link.peer.epoch != address.epoch:
            if address.endpoint == self._endpoint():
                raise StaleEpoch("the address was made before the transfer service restarted")
            link = await self._meet(address.endpoint)
        if link.peer.epoch != address.epoch:
            raise StaleEpoch("the address was made before the receiver's transfer service restarted")
        self._links.move_to_end(address.endpoint)
        return link.peer

    def route(self, source: Pool, address: KvAddress, peer: Peer) -> tuple[Transport, ...]:
        """Transports that can put pages of the pool there, best first: the nearest, then the fastest; those that
        failed a moment ago last. Raises NoTransport, which is logged and counted."""
        able, refusals = [], []
        for transport in self.transports:
            refusal = transport.refuses(source, address, peer)
            if refusal is None:
                able.append(transport)
            else:
                refusals.append(f"{transport.capabilities.name}: {refusal.why}")
        if not able:
            why = "; ".join(refusals)
            log.warning("no transport", extra={"fields": {"endpoint": address.endpoint, "why": why}})
            self.unroutable += 1
            raise NoTransport(why)
        return tuple(sorted(able, key=lambda transport: self._rank(transport, peer)))

    async def end_attempt(self, source: Pool, address: KvAddress, claim: Claim) -> bool:
        """As Transport.end_attempt, over any transport that works. Raises what peer and route raise, too."""
        peer = await self.peer(address)
        for transport in self.route(source, address, peer):
            try:
                return await transport.end_attempt(peer, address, claim)
            except TransportFailed as error:
                self.failed(peer, transport, error)
                failure = error
        raise failure

    def chosen(self, peer: Peer, transport: Transport) -> None:
        """A push to the peer is open over this transport."""
        link = self._links.get(peer.endpoint)
        if link is not None and link.transport != transport.capabilities.name:
            link.transport = transport.capabilities.name
            fields = {"endpoint": peer.endpoint, "transport": link.transport}
            log.info("transport chosen", extra={"fields": fields})

    def failed(self, peer: Peer, transport: Transport, error: TransportFailed) -> None:
        """The transport could not be set up; it is tried last for a while."""
        link = self._links.get(peer.endpoint)
        if link is None:
            return
        name = transport.capabilities.name
        link.fallbacks += 1
        link.last_fallback = f"{name}: {error.message}"
        link.avoid_until_s[name] = self._loop.time() + _AVOID_S
        fields = {"endpoint": peer.endpoint, "transport": name, "why": error.message}
        log.warning("transport failed", extra={"fields": fields})

    async def close(self) -> None:
        """Ends meetings under way and lets go of the transports."""
        meeting = tuple(self._meeting.values())
        for task in meeting:
            task.cancel()
        await asyncio.gather(*meeting, return_exceptions=True)
        for transport in self.transports:
            await transport.close()

    def _rank(self, transport: Transport, peer: Peer) -> tuple[bool, int, float]:
        capabilities = transport.capabilities
        link = self._links.get(peer.endpoint)
        if link is None:
            return False, _NEAREST_FIRST.index(capabilities.reach), 0.0
        avoided = self._loop.time() < link.avoid_until_s.get(capabilities.name, 0.0)
        # The sort is stable: what was not measured comes first, in the service's own order.
        slowness = -link.bytes_per_second.get(capabilities.name, float("inf"))
        return avoided, _NEAREST_FIRST.index(capabilities.reach), slowness

    async def _meet(self, endpoint: str) -> Link:
        """Asks a service who it is, once for all who want to know at the same time."""
        task = self._meeting.get(endpoint)
        if task is None:
            task = self._meeting[endpoint] = self._loop.create_task(self._introduce(endpoint))
            task.add_done_callback(lambda _: self._meeting.pop(endpoint))
        # A caller that leaves takes nobody else's answer away.
        return await asyncio.shield(task)

    async def _introduce(self, endpoint: str) -> Link:
        peer = await self._ask(endpoint)
        known = self._links.get(endpoint)
        if known is not None and known.peer.epoch == peer.epoch:
            return known
        # Under the name that senders use: the service may call itself by another one.
        link = Link(Peer(endpoint, peer.epoch, peer.offers))
        self._links[endpoint] = link
        if len(self._links) > MAX_PEERS:
            self._links.popitem(last=False)
        for transport in self.transports:
            name = transport.capabilities.name
            if name not in peer.offers:
                continue
            try:
                speed = await transport.probe(link.peer)
            except TransportFailed as error:
                self.failed(link.peer, transport, error)
                link.bytes_per_second[name] = 0.0  # after all that were measured, also when it is tried again
                continue
            if speed is not None:
                link.bytes_per_second[name] = speed
        speeds = {f"{name}_bytes_per_second": round(speed) for name, speed in link.bytes_per_second.items()}
        fields = {"endpoint": endpoint, "epoch": peer.epoch.hex(), "offers": sorted(peer.offers), **speeds}
        log.info("peer met", extra={"fields": fields})
        return link
