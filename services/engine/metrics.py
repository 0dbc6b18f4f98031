"""What /metrics shows of an engine. One process is one engine, so the metrics are the process's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.engine.core.api import Load, SequenceOutput
from services.protocol.timing import Timing

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)

ENGINE = Info("microserve_engine", "Which engine this is, and which model it serves.")
MAX_SEQUENCES = Gauge("microserve_engine_max_sequences", "Sequences that one step computes at most.")
STEP_SECONDS = Histogram("microserve_engine_step_seconds", "Time to compute one step.", buckets=_SECONDS)
MODEL_SECONDS = Counter("microserve_engine_model_seconds", "Time in the model: what is left of a step is around it.")
GENERATED_TOKENS = Counter("microserve_engine_generated_tokens", "Tokens generated.")
COMPUTED_TOKENS = Counter("microserve_engine_computed_tokens", "Prompt tokens whose KV was computed here.")
MATCHED_TOKENS = Counter("microserve_engine_cache_hit_tokens", "Prompt tokens whose KV was in the prefix cache.")
PREEMPTIONS = Counter("microserve_engine_preemptions", "Sequences preempted and recomputed.")
SEQUENCES = Counter("microserve_engine_sequences", "Sequences ended, by how.", ["outcome"])
QUEUE_SECONDS = Histogram(
    "microserve_engine_queue_seconds", "Time of a verb from arrival to first being scheduled.", buckets=_SECONDS
)
SENT_BYTES = Counter("microserve_engine_sent_bytes", "Bytes of KV pushed to peers.")
RECEIVED_BYTES = Counter("microserve_engine_received_bytes", "Bytes of KV written into this engine's pool by peers.")
PUSH_SECONDS = Histogram("microserve_engine_push_seconds", "Time of a push, by outcome.", ["outcome"], buckets=_SECONDS)
EXPOSED_SECONDS = Histogram(
    "microserve_engine_push_exposed_seconds",
    "Time of a push from the last layer computed to the last byte in place.",
    buckets=_SECONDS,
)


def count_outputs(outputs: Sequence[SequenceOutput]) -> None:
    """Counts what one step produced."""
    GENERATED_TOKENS.inc(sum(len(output.token_ids) for output in outputs))
    for output in outputs:
        outcome = output.error.reason if output.error is not None else output.finish_reason
        if outcome is not None:
            SEQUENCES.labels(outcome).inc()
        if output.timing is not None:
            count_verb(output.timing)


def count_verb(timing: Timing) -> None:
    """Counts what one verb cost."""
    COMPUTED_TOKENS.inc(timing.computed_tokens)
    MATCHED_TOKENS.inc(timing.matched_tokens)
    PREEMPTIONS.inc(timing.preemptions)
    QUEUE_SECONDS.observe(timing.queue_s)


class LoadCollector(Collector):
    """The newest load as gauges, read when somebody asks."""

    def __init__(self, latest: Callable[[], Load | None]) -> None:
        self._latest = latest
        REGISTRY.register(self)

    def close(self) -> None:
        """Shows the load no more."""
        REGISTRY.unregister(self)

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client: every metric with its present value."""
        load = self._latest()
        if load is not None:
            yield from _metrics(load)

    def describe(self) -> Iterable[Metric]:
        """Nothing to ask for before there is a load."""
        return ()


def _metrics(load: Load) -> Iterator[Metric]:
    gauge = GaugeMetricFamily("microserve_engine_sequences_now", "Sequences, by state.", labels=["state"])
    gauge.add_metric(["running"], load.running_sequences)
    gauge.add_metric(["waiting"], load.waiting_sequences)
    gauge.add_metric(["waiting_for_kv"], load.waiting_for_kv)
    yield gauge
    pages = GaugeMetricFamily("microserve_engine_pages", "Pages of the pool, by state.", labels=["state"])
    for state in ("free", "cached", "held", "quarantined"):
        pages.add_metric([state], getattr(load.pages, state))
    yield pages
    yield GaugeMetricFamily("microserve_engine_reservations", "Live reservations.", value=load.reservations)
    yield GaugeMetricFamily(
        "microserve_engine_queued_tokens", "Prompt tokens not computed yet.", value=load.queued_tokens
    )
    yield GaugeMetricFamily(
        "microserve_engine_context_tokens", "Tokens of context in the batch.", value=load.context_tokens
    )
    yield GaugeMetricFamily("microserve_engine_draining", "Whether the engine stops.", value=int(load.draining))
    yield CounterMetricFamily("microserve_engine_steps", "Steps computed.", value=load.steps)
