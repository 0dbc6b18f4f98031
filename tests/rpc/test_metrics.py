"""/metrics over a real socket."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from services.rpc.errors import PortInUse
from services.rpc.metrics import MetricsServer


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
