"""What the commands ask and show. All of it prints as JSON by dataclasses.asdict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask a router."""

    text: str
    policy: str = ""  # empty: the router's current one
    max_tokens: int = 128
    temperature: float = 0.0  # greedy
    seed: int | None = None
    model: str = ""  # empty: the only one
    raw: bool = False  # continue the text as it is, with no chat template


@dataclass(frozen=True, slots=True)
class Leg:
    """One verb of a request. Counts are tokens; see microserve.types.v1.Timing."""

    verb: str
    engine: str
    begin: int
    end: int
    matched: int
    transferred: int
    computed: int
    generated: int
    transferred_bytes: int
    elapsed_ms: float
    first_token_ms: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    text: str
    request_id: str
    policy: str
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine as the router sees it. Numbers are None where it does not hear from the engine."""

    name: str
    address: str
    healthy: bool
    problem: str
    model: str
    device: str
    running: int | None
    waiting: int | None
    reservations: int | None
    pages_free: int | None
    pages_cached: int | None
    pages_total: int | None
    draining: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """A router program."""

    name: str
    summary: str
    current: bool
    file: str


@dataclass(frozen=True, slots=True)
class Arm:
    """One program of a split, and what came of its requests. Times are of those that ended well."""

    policy: str
    percent: float
    requests: dict[str, int]  # by canonical status code
    ttft_mean_ms: float
    ttft_p99_ms: float
    tpot_mean_ms: float
    jct_mean_ms: float
    jct_p99_ms: float


@dataclass(frozen=True, slots=True)
class Split:
    """How requests that name no policy are shared out. No arms: there never was a split."""

    active: bool
    arms: tuple[Arm, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve a request, and what was expected of it."""

    pattern: str
    decode: str
    prefill: str
    split: int
    hold_ms: float
    wait_ms: float
    compute_ms: float
    transfer_ms: float
    decode_ms: float
    delay_ms: float
    ttft_ms: float
    jct_ms: float
    cost_ms: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a request ran where it did. `chosen` is None if its policy weighs nothing."""

    request_id: str
    policy: str
    code: str
    chosen: Option | None
    alternatives: tuple[Option, ...]
    weighed: int
    ttft_ms: float | None
    jct_ms: float
    output_tokens: int
    legs: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service of the launcher listens."""

    name: str
    pid: int
    grpc: str
    http: str | None
    log: str


@dataclass(frozen=True, slots=True)
class Topic:
    """Requests that share a long prefix."""

    name: str
    model: str
    tokens: int
    requests_per_s: float
    homes: tuple[str, ...]  # engines
    cached_tokens: dict[str, int]  # of the prefix, by engine


@dataclass(frozen=True, slots=True)
class Move:
    """A context that was to be copied to an engine."""

    age_s: float
    topic: str
    source: str
    target: str
    tokens: int
    why: str
    code: str
    moved_tokens: int
    moved_bytes: int
    elapsed_ms: float


@dataclass(frozen=True, slots=True)
class Planner:
    """What the planner sees and did."""

    planner: str  # empty: none was started
    problem: str  # why it does not run; empty: it runs
    age_s: float
    looks: int
    topics: tuple[Topic, ...]
    moves: tuple[Move, ...]  # the last one first
    moves_by_code: dict[str, int]
    programs: tuple[Policy, ...]
