"""Which transport is used to a peer: the nearest, then the fastest, and the next best when one cannot."""

from __future__ import annotations

from typing import Any

import pytest

from services.kvtransfer import links as links_module
from services.kvtransfer.errors import NoTransport, PeerUnreachable, TransportFailed
from services.kvtransfer.links import Links
from services.kvtransfer.transports.base import Capabilities, Peer, Reach, Unsupported
from services.protocol.address import KvAddress
from services.protocol.errors import StaleEpoch
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange

OWN, OTHER, RESTARTED = b"o" * 16, b"p" * 16, b"q" * 16


class FakeTransport:
    """Only what choosing needs."""

    def __init__(self, name: str, reach: Reach, speed: float | None = None, refusal: str = "") -> None:
        self.capabilities = Capabilities(name, reach)
        self.speed, self.refusal, self.probes = speed, refusal, 0

    def offer(self) -> str | None:
        return "here"

    def refuses(self, source: Any, address: KvAddress, peer: Peer) -> Unsupported | None:
        return Unsupported(self.refusal) if self.refusal else None

    async def probe(self, peer: Peer) -> float | None:
        self.probes += 1
        if self.speed == 0:
            raise TransportFailed("cannot be probed")
        return self.speed

    async def close(self) -> None:
        pass


def address(epoch: bytes = OTHER) -> KvAddress:
    layout = PageLayout(1, 1, 1, 1, Dtype.FLOAT32)
    return KvAddress("r", "other:1", epoch, b"", TokenRange(0, 1), (), layout, b"", b"")


def links(*transports: FakeTransport) -> Links:
    async def ask(endpoint: str) -> Peer:
        if endpoint != "other:1":
            raise PeerUnreachable("nobody there")
        return Peer(endpoint, OTHER, {transport.capabilities.name: "there" for transport in transports})

    return Links(transports, OWN, lambda: "own:1", ask)  # type: ignore[arg-type]


async def names(table: Links) -> list[str]:
    peer = await table.peer(address())
    return [transport.capabilities.name for transport in table.route(None, address(), peer)]  # type: ignore[arg-type]


async def test_the_nearest_and_then_the_fastest_comes_first() -> None:
    table = links(
        FakeTransport("slow", Reach.NETWORK, 1e6),
        FakeTransport("fast", Reach.NETWORK, 1e9),
        FakeTransport("near", Reach.SAME_SERVICE, 1e3),
        FakeTransport("never", Reach.SAME_SERVICE, refusal="too far"),
    )
    assert await names(table) == ["near", "fast", "slow"]
    (link,) = table.all()
    assert link.bytes_per_second == {"slow": 1e6, "fast": 1e9, "near": 1e3}


async def test_peers_are_asked_and_probed_once() -> None:
    transport = FakeTransport("tcp", Reach.NETWORK, 1e9)
    table = links(transport)
    assert await names(table) == await names(table) == ["tcp"]
    assert transport.probes == 1


async def test_what_failed_is_tried_last_and_shown() -> None:
    first, second = FakeTransport("first", Reach.SAME_SERVICE, 1e9), FakeTransport("second", Reach.NETWORK, 1e6)
    table = links(first, second)
    peer = await table.peer(address())
    table.failed(peer, first, TransportFailed("no device"))  # type: ignore[arg-type]
    assert await names(table) == ["second", "first"]
    table.chosen(peer, second)  # type: ignore[arg-type]
    (link,) = table.all()
    assert (link.transport, link.fallbacks, link.last_fallback) == ("second", 1, "first: no device")


async def test_a_transport_whose_probe_fails_is_tried_last() -> None:
    table = links(FakeTransport("dead", Reach.SAME_SERVICE, 0), FakeTransport("tcp", Reach.NETWORK, 1.0))
    assert await names(table) == ["tcp", "dead"]
    assert table.all()[0].fallbacks == 1


async def test_a_transport_whose_probe_failed_stays_behind_those_that_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links_module, "_AVOID_S", 0.0)  # what is avoided for a while is so no more
    table = links(FakeTransport("dead", Reach.NETWORK, 0), FakeTransport("tcp", Reach.NETWORK, 1.0))
    assert await names(table) == ["tcp", "dead"]


async def test_no_transport_says_why_of_each() -> None:
    table = links(
        FakeTransport("a", Reach.NETWORK, refusal="no card"), FakeTransport("b", Reach.NETWORK, refusal="off")
    )
    peer = await table.peer(address())
    with pytest.raises(NoTransport, match="a: no card; b: off"):
        table.route(None, address(), peer)  # type: ignore[arg-type]
    assert table.unroutable == 1


async def test_an_address_of_an_incarnation_that_is_gone() -> None:
    table = links(FakeTransport("tcp", Reach.NETWORK))
    with pytest.raises(StaleEpoch):
        await table.peer(address(RESTARTED))


async def test_a_peer_that_did_not_restart_is_not_probed_again() -> None:
    """Whoever comes with old addresses causes no traffic, and what is known of the link stays."""
    transport = FakeTransport("tcp", Reach.NETWORK, 1e9)
    table = links(transport)
    peer = await table.peer(address())
    table.failed(peer, transport, TransportFailed("no device"))  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(StaleEpoch):
            await table.peer(address(RESTARTED))
    assert transport.probes == 1
    assert table.all()[0].fallbacks == 1
