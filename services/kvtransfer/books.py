"""What was moved, refused and under way: the source of GetStats and of /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.kvtransfer.errors import TransportFailed
from services.kvtransfer.links import Link, Links
from services.kvtransfer.push import Push
from services.protocol.errors import ProtocolError

_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


@dataclass(slots=True)
class TransportCounters:
    """Sums over the pushes that a transport carried, since the service began. `note`: Capabilities.note."""

    note: str = ""
    pushes: int = 0
    num_bytes: int = 0
    failures: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolCount:
    """A pool and what goes on in it."""

    pool_id: str
    engine_name: str
    size_bytes: int
    attached: bool
    grants: int
    pushes: int
    received_bytes: int
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Everything that GetStats tells."""

    epoch: bytes
    pools: tuple[PoolCount, ...]
    transports: tuple[tuple[str, TransportCounters], ...]
    refused_writes: int
    # Pushes for which no transport was found.
    unroutable_pushes: int
    links: tuple[Link, ...]


class Books:
    """A PushObserver that keeps counters, by transport."""

    def __init__(self, links: Links, registry: CollectorRegistry) -> None:
        capabilities = [transport.capabilities for transport in links.transports]
        self.transports = {each.name: TransportCounters(each.note) for each in capabilities}
        self.refused_pushes = 0
        self._links = links
        self._push_seconds = Histogram(
            "microserve_kvtransfer_push_seconds",
            "Time from a push's admission to its last byte.",
            ["transport"],
            registry=registry,
            buckets=_BUCKETS_S,
        )
        self._exposed_seconds = Histogram(
            "microserve_kvtransfer_push_exposed_seconds",
            "Time from the last layer ready to the last byte in place.",
            ["transport"],
            registry=registry,
            buckets=_BUCKETS_S,
        )

    def refused(self, error: BaseException) -> None:
        """A push was refused before it began."""
        if isinstance(error, ProtocolError):
            self.refused_pushes += 1

    def failed_to_open(self, push: Push, error: TransportFailed) -> None:
        """See PushObserver."""
        self._links.failed(push.request.peer, push.transport, error)

    def opened(self, push: Push) -> None:
        """See PushObserver."""
        self._links.chosen(push.request.peer, push.transport)

    def moved(self, push: Push, num_bytes: int) -> None:
        """See PushObserver."""
        push.request.source.sent_bytes += num_bytes
        self.transports[push.transport.capabilities.name].num_bytes += num_bytes

    def ended(self, push: Push, failure: BaseException | None) -> None:
        """See PushObserver."""
        progress, name = push.progress, push.transport.capabilities.name
        counters = self.transports[name]
        counters.busy_s += push.busy_s
        if failure is not None:
            counters.failures += 1
            if progress is None:
                self.refused(failure)
            return
        counters.pushes += 1
        self._push_seconds.labels(name).observe(asyncio.get_running_loop().time() - push.begin_s)
        if progress is not None and progress.num_bytes:
            self._exposed_seconds.labels(name).observe(progress.exposed_s)


class StatsCollector(Collector):
    """Shows Stats to Prometheus, read anew at every scrape."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The present numbers; called on the thread of a scrape."""
        stats, prefix = self._stats(), "microserve_kvtransfer"
        pushes = CounterMetricFamily(f"{prefix}_pushes", "Pushes ended.", labels=["transport", "outcome"])
        moved = CounterMetricFamily(f"{prefix}_bytes", "Bytes moved by pushes.", labels=["transport"])
        busy = CounterMetricFamily(f"{prefix}_busy_seconds", "Time spent copying.", labels=["transport"])
        for name, counters in stats.transports:
            pushes.add_metric([name, "done"], counters.pushes)
            pushes.add_metric([name, "failed"], counters.failures)
            moved.add_metric([name], counters.num_bytes)
            busy.add_metric([name], counters.busy_s)
        yield from (pushes, moved, busy)
        yield CounterMetricFamily(f"{prefix}_refused_writes", "Writes refused.", value=stats.refused_writes)
        yield CounterMetricFamily(
            f"{prefix}_unroutable_pushes", "Pushes with no transport.", value=stats.unroutable_pushes
        )
        fallbacks = CounterMetricFamily(
            f"{prefix}_fallbacks", "Transports that could not be set up.", labels=["endpoint"]
        )
        speeds = GaugeMetricFamily(
            f"{prefix}_link_bytes_per_second", "Speed as probed.", labels=["endpoint", "transport", "chosen"]
        )
        # Also of what is not probed, and so has no speed.
        in_use = GaugeMetricFamily(
            f"{prefix}_link_transport", "1 for the one in use.", labels=["endpoint", "transport"]
        )
        for link in stats.links:
            fallbacks.add_metric([link.peer.endpoint], link.fallbacks)
            if link.transport:
                in_use.add_metric([link.peer.endpoint, link.transport], 1)
            for name, speed in tuple(link.bytes_per_second.items()):
                speeds.add_metric([link.peer.endpoint, name, str(name == link.transport).lower()], speed)
        yield from (fallbacks, in_use, speeds)
        pools = GaugeMetricFamily(f"{prefix}_pool_bytes", "Bytes of a pool.", labels=["engine", "attached"])
        grants = GaugeMetricFamily(f"{prefix}_open_grants", "Grants open or draining.", labels=["engine"])
        live = GaugeMetricFamily(f"{prefix}_live_pushes", "Pushes under way.", labels=["engine"])
        for pool in stats.pools:
            pools.add_metric([pool.engine_name, str(pool.attached).lower()], pool.size_bytes)
            grants.add_metric([pool.engine_name], pool.grants)
            live.add_metric([pool.engine_name], pool.pushes)
        yield from (pools, grants, live)
