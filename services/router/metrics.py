"""What the router counts. Labels are bounded in number: policies are named without their parameters, and a model that
is not served is "none"."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

Metric = TypeVar("Metric", Counter, Histogram)

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
# Of what clients see: service levels are agreed in such numbers.
_CLIENT_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

REQUESTS = Counter(
    "microserve_router_requests",
    "Requests that ended, by model, policy and canonical status code.",
    ["model", "policy", "code"],
)
REQUESTS_IN_FLIGHT = Gauge("microserve_router_requests_in_flight", "Requests under way.")
SESSIONS = Gauge("microserve_router_sessions", "Sessions of clients that are open, busy or not.")
QUEUED = Gauge("microserve_router_queued", "Requests that wait for their turn, by priority.", ["priority"])
QUEUE_SECONDS = Histogram(
    "microserve_router_queue_seconds",
    "Time for which requests that had to wait waited, by priority.",
    ["priority"],
    buckets=_SECONDS,
)
REFUSALS = Counter(
    "microserve_router_refusals",
    "Requests refused before an engine was asked, by priority and reason.",
    ["priority", "reason"],
)
TTFT_SECONDS = Histogram(
    "microserve_router_ttft_seconds",
    "Time from a request's arrival to its first token, by model and policy.",
    ["model", "policy"],
    buckets=_CLIENT_SECONDS,
)
TPOT_SECONDS = Histogram(
    "microserve_router_tpot_seconds",
    "Mean time between the tokens of a request after its first, by model and policy.",
    ["model", "policy"],
    buckets=_CLIENT_SECONDS,
)
DURATION_SECONDS = Histogram(
    "microserve_router_duration_seconds",
    "Time from a request's arrival to its end, by model and policy.",
    ["model", "policy"],
    buckets=_CLIENT_SECONDS,
)
VERB_SECONDS = Histogram(
    "microserve_router_verb_seconds",
    "Time from the router's call of a verb to its end, by verb and canonical status code.",
    ["verb", "code"],
    buckets=_SECONDS,
)
TOKENS = Counter(
    "microserve_router_tokens",
    "Tokens of requests that ended well: prompt, cached (of these, on the generating engine), output.",
    ["kind"],
)
FALLBACKS = Counter(
    "microserve_router_fallbacks",
    "Requests served data parallel because their policy could not run, by policy and reason.",
    ["policy", "reason"],
)
RETRIES = Counter(
    "microserve_router_retries",
    "Requests that went on after a verb had failed, by stage (before_first_token, continued) and reason.",
    ["stage", "reason"],
)
CLEANUP_FAILURES = Counter(
    "microserve_router_cleanup_failures",
    "Releases and cancels that did not get through; the lease ends what they were for.",
    ["what", "reason"],
)
ABANDONED_POLICIES = Counter(
    "microserve_router_abandoned_policies",
    "Programs that did not end when they were cancelled and were left behind.",
    ["policy"],
)
BREAKER_STATE = Gauge(
    "microserve_router_breaker_state",
    "Breaker of each engine of the fleet: 0 closed, 1 half open, 2 open.",
    ["address"],
)
ENGINE_FAILURES = Counter(
    "microserve_router_engine_failures",
    "Failures of verbs that count against an engine, as its breaker sees them.",
    ["address"],
)
ARM_REQUESTS = Counter(
    "microserve_router_arm_requests",
    "Requests that ended while traffic was split, by arm (a program with its parameters) and canonical status code.",
    ["arm", "code"],
)
ARM_SECONDS = Histogram(
    "microserve_router_arm_seconds",
    "Times of requests that ended well while traffic was split, by arm: ttft, tpot and jct.",
    ["arm", "time"],
    buckets=_SECONDS,
)
BLOCKED_LOOPS = Counter(
    "microserve_router_blocked_loops",
    "Times the event loop was found standing still, by the program that held it (router: none did).",
    ["policy"],
)
ENGINES = Gauge(
    "microserve_router_engines",
    "Engines of the fleet: healthy ones get work, unhealthy ones take none, passed_over ones differ from the others.",
    ["state"],
)
HTTP_REQUESTS = Counter(
    "microserve_router_http_requests",
    "HTTP requests that were answered, by path and status; 499: the client left first.",
    ["path", "status"],
)
PLANNER_RUNNING = Gauge("microserve_router_planner_running", "1 while a planner runs.")
PLANNER_FAILURES = Counter(
    "microserve_router_planner_failures",
    "Planners that raised, stood still, left something open or ended by themselves, and were cut, by planner.",
    ["planner"],
)
PLANNER_LOOKS = Counter("microserve_router_planner_looks", "Views that a planner was given of the whole fleet.")
PLANNER_TOPICS = Gauge("microserve_router_planner_topics", "Topics in the traffic at the planner's last look.")
PLANNER_MOVES = Counter(
    "microserve_router_planner_moves",
    "Contexts that a planner moved, by outcome: OK, the reason of a failure, or CANCELLED.",
    ["code"],
)
PLANNER_MOVED_TOKENS = Counter("microserve_router_planner_moved_tokens", "Tokens whose KV a planner moved.")
PLANNER_MOVED_BYTES = Counter("microserve_router_planner_moved_bytes", "Bytes of KV that a planner moved.")


@cache
def of(metric: Metric, *labels: str) -> Metric:
    """`metric.labels(*labels)`, looked up once: for those that every request counts. Their labels are never removed."""
    return metric.labels(*labels)
