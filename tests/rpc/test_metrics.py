"""/metrics over a real socket."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.rpc import metrics
from services.rpc.bind import split_address
from services.rpc.errors import PortInUse
from services.rpc.metrics import MetricsServer
from tests.fakes import PATIENCE_S
from tests.limits import few_descriptors


@contextmanager
def serving() -> Iterator[MetricsServer]:
    server = MetricsServer(0, registry=CollectorRegistry())
    try:
        yield server
    finally:
        server.close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(split_address(server.address), timeout=PATIENCE_S)


def scraped(server: MetricsServer) -> int:
    """The status of a scrape."""
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=PATIENCE_S) as reply:
        status: int = reply.status
        return status


def test_serves_counters_until_closed() -> None:
    registry = CollectorRegistry()
    Counter("pages_moved", "Pages.", registry=registry).inc(3)
    server = MetricsServer(0, registry=registry)
    assert server.address.startswith("127.0.0.1:")
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=60) as reply:
        text = reply.read()
        assert b"pages_moved_total 3.0" in text
        assert b"_created" not in text
    with pytest.raises(PortInUse):
        MetricsServer(int(server.address.split(":")[1]))
    server.close()
    server.close()
    MetricsServer(int(server.address.split(":")[1]), registry=registry).close()


def test_who_says_nothing_holds_no_thread_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._QuietHandler, "timeout", 0.01)
    with serving() as server, connect(server) as silent:
        assert silent.recv(1) == b""


def test_who_asks_slowly_holds_no_thread_for_ever_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics._QuietHandler, "timeout", 0.1)
    with serving() as server, connect(server) as slow:
        slow.settimeout(0.01)
        assert cut_off(slow)


def cut_off(slow: socket.socket) -> bool:
    """Whether it is closed while it says a byte now and then."""
    gives_up_s = monotonic() + PATIENCE_S
    while monotonic() < gives_up_s:
        try:
            slow.sendall(b"x")
            if slow.recv(1) == b"":
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


@pytest.mark.slow
def test_scrapes_at_once_are_bounded() -> None:
    with serving() as server:
        silent = [connect(server) for _ in range(metrics._MOST_SCRAPES)]
        with connect(server) as one_more:
            assert one_more.recv(1) == b""
        for connection in silent:
            connection.close()
        # Their threads end when they hear of it.
        for thread in threading.enumerate():
            if "process_request_thread" in thread.name:
                thread.join(PATIENCE_S)
        assert scraped(server) == 200


def test_a_thread_that_cannot_be_started_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", _no_thread)
            for _ in range(metrics._MOST_SCRAPES + 1):
                with connect(server) as refused:
                    assert refused.recv(1) == b""
        assert scraped(server) == 200


def test_without_descriptors_it_pauses_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be taken stays ready to be taken: to try again at once would keep a core busy."""
    paused, go_on = threading.Event(), threading.Event()

    def pause(seconds: float) -> None:
        paused.set()
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(metrics, "sleep", pause)
    with serving() as server, socket.socket() as client:
        client.settimeout(PATIENCE_S)
        with few_descriptors():
            client.connect(split_address(server.address))
            assert paused.wait(PATIENCE_S)
        go_on.set()
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert client.recv(64).startswith(b"HTTP/1.0 200")


def test_all_addresses_of_both_kinds() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    server = MetricsServer(0, host="::")
    port = split_address(server.address)[1]
    assert server.address == f"[::]:{port}"
    server.close()


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
