"""Two services in one process: TLS, checksums, loss of the peer, and what is shown of the link."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import trustme
from microserve.kvtransfer.v1 import kvtransfer_pb2 as pb

from services.kvtransfer.errors import TransportFailed
from services.kvtransfer.transports.tcp import inbound_put
from services.kvtransfer.transports.tcp.channel import Channel
from services.kvtransfer.transports.tcp.transport import TcpTransport
from services.protocol.errors import Code, ServiceError
from tests.kvtransfer import port as ports
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.oracle import expected
from tests.kvtransfer.port import PATIENCE_S, DirectPort
from tests.kvtransfer.streams import Watching

pytestmark = pytest.mark.asyncio(loop_scope="session")


@asynccontextmanager
async def pair(near: dict[str, Any], far: dict[str, Any]) -> AsyncIterator[tuple[FakeEngine, FakeEngine]]:
    """A sender and a receiver on services with these options."""
    ports = DirectPort(**near), DirectPort(**far)
    sender, receiver = FakeEngine(ports[0], "p"), FakeEngine(ports[1], "d")
    try:
        yield await sender.start(seed=1), await receiver.start()
    finally:
        sender.close()
        receiver.close()
        for port in ports:
            await port.close()


async def moves(sender: FakeEngine, receiver: FakeEngine, name: str = "r") -> None:
    """A push with a partial page arrives."""
    before = receiver.memory.copy()
    address = await receiver.grant(name, 0, 10, [4, 5, 6])
    last = await sender.push(sender.order(address, 0, 10, [1, 2, 3])).done()
    assert (last.state, last.transport) == (pb.PUSH_STATE_COMMITTED, "tcp")
    np.testing.assert_array_equal(receiver.memory, expected(before, receiver, sender, 0, 10, [1, 2, 3], [4, 5, 6]))
    await receiver.revoke(name)


async def refused(sender: FakeEngine, receiver: FakeEngine, name: str = "r") -> ServiceError:
    address = await receiver.grant(name, 0, 8, [4, 5])
    with pytest.raises(ServiceError) as caught:
        await sender.push(sender.order(address, 0, 8, [1, 2])).done()
    return caught.value


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Any]:
    """Options of a service that shows, and asks for, certificates of one authority."""
    return issued_by(trustme.CA(), tmp_path)


def issued_by(authority: trustme.CA, folder: Path) -> dict[str, Any]:
    """The same, with files written to `folder` in place of those that are there."""
    server = authority.issue_cert("127.0.0.1", "localhost")
    ca, cert, key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    authority.cert_pem.write_to_path(str(ca))
    server.private_key_pem.write_to_path(str(key))
    cert.write_bytes(b"".join(blob.bytes() for blob in server.cert_chain_pems))
    peer = {"peer_tls_ca": ca, "peer_tls_cert": cert, "peer_tls_key": key}
    return {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca, **peer}


async def test_mutual_tls(certificates: dict[str, Any]) -> None:
    async with pair(certificates, certificates) as (sender, receiver):
        for number in range(3):
            await moves(sender, receiver, f"r{number}")


async def test_replaced_certificates_are_used_without_a_restart(tmp_path: Path) -> None:
    """Two services that do not trust one another, until both are given certificates of one authority."""
    folders = tmp_path / "near", tmp_path / "far"
    for folder in folders:
        folder.mkdir()
    near, far = (issued_by(trustme.CA(), folder) for folder in folders)
    async with pair(near, far) as (sender, receiver):
        assert (await refused(sender, receiver)).reason == "TRANSPORT_FAILED"
        await receiver.revoke("r")
        authority = trustme.CA()
        for folder in folders:
            issued_by(authority, folder)
        await moves(sender, receiver, "again")


async def test_tls_without_a_certificate_to_show(certificates: dict[str, Any]) -> None:
    stranger = {"peer_tls_ca": certificates["peer_tls_ca"]}
    async with pair(stranger, certificates) as (sender, receiver):
        assert (await refused(sender, receiver)).reason == "TRANSPORT_FAILED"


async def test_tls_on_one_side_only(certificates: dict[str, Any]) -> None:
    """Neither quietly in the clear nor a riddle: no transport, and why."""
    for near, far in ((certificates, {}), ({}, certificates)):
        async with pair(near, far) as (sender, receiver):
            error = await refused(sender, receiver)
            assert error.reason == "NO_TRANSPORT"
            assert "TLS" in error.message


@pytest.mark.parametrize("wanted_by", ["sender", "receiver"])
async def test_checksums(wanted_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that arrives otherwise than it was sent is DATA_LOSS, and what it held never counts."""
    wants: dict[str, Any] = {"checksums": True}
    async with pair(wants if wanted_by == "sender" else {}, wants if wanted_by == "receiver" else {}) as (p, d):
        await moves(p, d)
        computed: Callable[..., int] = inbound_put.checksum_of
        monkeypatch.setattr(inbound_put, "checksum_of", lambda views: computed(views) ^ 1)
        error = await refused(p, d, "broken")
        assert (error.code, error.reason) == (Code.DATA_LOSS, "CHECKSUM_MISMATCH")
        watch = Watching(d.watch())
        await watch.until(lambda events: "broken" in events)
        assert not watch.events["broken"].committed
        await watch.close()


async def test_the_peer_goes_and_comes_back() -> None:
    async with pair({}, {}) as (sender, receiver):
        await moves(sender, receiver)
        address = await receiver.grant("r2", 0, 8, [4, 5])
        push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
        await push.opened()
        await receiver.port.close()
        with pytest.raises(ServiceError) as caught:
            await push.done()
        assert caught.value.reason == "PEER_LOST"
        with pytest.raises(ServiceError) as caught:
            await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()
        assert caught.value.reason == "TRANSPORT_FAILED"
        # Nothing is left of it at the sender, though nobody can be asked.
        assert not await sender.end_attempt(sender.order(address, 0, 8, [1, 2]))
        other = DirectPort()
        successor = await FakeEngine(other, "d").start()
        await moves(sender, successor)
        successor.close()
        await other.close()


async def test_what_is_shown_of_a_link() -> None:
    async with pair({}, {"data_listen": None}) as (sender, receiver):
        error = await refused(sender, receiver)
        assert error.reason == "NO_TRANSPORT"
        assert "data port" in error.message
    async with pair({}, {}) as (sender, receiver):
        await moves(sender, receiver)
        (link,) = (await sender.port.call("GetStats", pb.GetStatsRequest())).links
        assert (link.transport, link.epoch, link.endpoint) == ("tcp", receiver.epoch, receiver.endpoint)
        assert [speed.transport for speed in link.speeds] == ["tcp"]


async def test_the_choice_and_a_fallback_are_in_stats_log_and_metrics(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="services.kvtransfer.links")
    async with pair({}, {}) as (sender, receiver):
        endpoint, registry = receiver.endpoint, sender.port.registry  # type: ignore[attr-defined]

        def shown(metric: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"microserve_kvtransfer_{metric}", {"endpoint": endpoint, **labels})

        def logged(message: str) -> list[dict[str, str]]:
            return [record.fields for record in caplog.records if record.message == message]  # type: ignore[attr-defined]

        await moves(sender, receiver)
        assert shown("link_transport", transport="tcp") == 1
        assert shown("link_bytes_per_second", transport="tcp", chosen="true")
        assert shown("fallbacks_total") == 0
        assert logged("transport chosen") == [{"endpoint": endpoint, "transport": "tcp"}]
        address = await receiver.grant("r2", 0, 8, [4, 5])
        await receiver.port.close()
        reason = ""
        while reason != "TRANSPORT_FAILED":  # the first push may find the connection as it was
            with pytest.raises(ServiceError) as caught:
                await sender.push(sender.order(address, 0, 8, [1, 2], attempt=2)).done()
            reason = caught.value.reason
        (link,) = (await sender.port.call("GetStats", pb.GetStatsRequest())).links
        assert link.fallback_count == shown("fallbacks_total") == len(logged("transport failed")) > 0
        assert link.last_fallback.startswith("tcp: ")


async def test_several_connections_to_one_peer() -> None:
    """Reservations share them out; all of one attempt goes over one, whatever is under way on the others."""
    names = [f"r{number}" for number in range(8)]
    assert {crc32(name.encode()) % 3 for name in names} == {0, 1, 2}
    async with pair({"connections_per_peer": 3}, {}) as (sender, receiver):
        before = receiver.memory.copy()
        orders, wanted = [], before
        for number, name in enumerate(names):
            pages = [2 * number, 2 * number + 1]
            address = await receiver.grant(name, 0, 8, pages)
            orders.append(sender.order(address, 0, 8, [number, number + 1], ready_slot=number))
            wanted = expected(wanted, receiver, sender, 0, 8, [number, number + 1], pages)
        pushes = [sender.push(order) for order in orders]
        for push in pushes:
            await push.opened()
        (tcp,) = (t for t in sender.port.service._links.transports if isinstance(t, TcpTransport))  # type: ignore[attr-defined]
        assert {slot for _, slot in tcp._connections} == {0, 1, 2}
        for number in reversed(range(len(pushes))):
            sender.pool.raise_ready(number, 3)
        assert {(await push.done()).state for push in pushes} == {pb.PUSH_STATE_COMMITTED}
        np.testing.assert_array_equal(receiver.memory, wanted)


@pytest.mark.parametrize("side", ["kv-out", "kv-in"])
async def test_a_machine_that_gives_no_thread(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks then is refused, nobody waits for ever, and the next one is served."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(side):
            raise RuntimeError("can't start new thread")
        start(thread)

    async with pair({}, {"data_connections": 1}) as (sender, receiver):
        with monkeypatch.context() as context:
            context.setattr(threading.Thread, "start", refuse)
            for name in ("a", "b"):
                async with asyncio.timeout(PATIENCE_S):
                    assert (await refused(sender, receiver, name)).reason == "TRANSPORT_FAILED"
                await receiver.revoke(name)
        await moves(sender, receiver)


async def test_a_machine_that_gives_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above; the connection that could not be served is closed."""

    def refuse(*_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    near, far = socket.create_server(("127.0.0.1", 0)), socket.socket()
    with near, far:
        far.connect(near.getsockname())
        with monkeypatch.context() as context:
            context.setattr(os, "eventfd", refuse)
            with pytest.raises(TransportFailed, match="Too many open files"):
                Channel(far)
        assert far.fileno() < 0


async def test_cancelled_pushes_leave_nothing_behind() -> None:
    async with pair({}, {}) as (sender, receiver):
        for number in range(3):
            address = await receiver.grant(f"r{number}", 0, 8, [4, 5])
            push = sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0))
            await push.opened()
            await push.close()
            await receiver.revoke(f"r{number}")
        await moves(sender, receiver)
        (tcp,) = (t for t in sender.port.service._links.transports if isinstance(t, TcpTransport))  # type: ignore[attr-defined]
        assert [connection._waiting for connection in tcp._connections.values()] == [{}]


async def test_a_service_that_drains_lets_what_arrives_end() -> None:
    """And begins nothing for others; a revoke ends the wait, too."""
    async with pair({}, {}) as (sender, receiver):
        service = receiver.port.service  # type: ignore[attr-defined]
        addresses = [await receiver.grant(name, 0, 8, pages) for name, pages in (("r", [4, 5]), ("s", [6, 7]))]
        first, second = (sender.push(sender.order(address, 0, 8, [1, 2], ready_slot=0)) for address in addresses)
        await first.opened()
        await second.opened()
        draining = asyncio.create_task(service.drain())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not draining.done()
        await receiver.revoke("s")
        with pytest.raises(ServiceError):
            await second.done()
        assert not draining.done()
        sender.pool.raise_ready(0, 3)
        assert (await first.done()).state == pb.PUSH_STATE_COMMITTED
        await asyncio.wait_for(draining, PATIENCE_S)


async def test_an_attempt_at_a_receiver_that_restarted_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number is of an incarnation that is gone: there is nobody to ask and nothing to keep."""
    async with pair({}, {}) as (sender, receiver):
        order = sender.order(await receiver.grant("r", 0, 8, [4, 5]), 0, 8, [1, 2], ready_slot=0)
        push = sender.push(order)
        await push.opened()
        await receiver.port.close()
        with pytest.raises(ServiceError):
            await push.done()
        other = DirectPort()
        successor = await FakeEngine(other, "d").start()
        successor.endpoint = receiver.endpoint
        with monkeypatch.context() as context:
            context.setitem(ports._direct, receiver.endpoint, other.service)
            await moves(sender, successor)
            assert not await sender.end_attempt(order)
        (outbox,) = sender.port.service._pushes._outboxes.values()  # type: ignore[attr-defined]
        assert not outbox.open_attempts
        successor.close()
        await other.close()
