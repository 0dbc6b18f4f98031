"""What the gRPC side and the engine's loop thread say to each other. Plain data: no grpc, no torch.

The gRPC side submits commands; the loop thread owns all engine state and answers each `reply` exactly once. Effects
on the KV transfer service go out through a KvPort (ports.py) and come back as commands. Nothing here blocks: replies,
listener and port methods are called on the loop thread and must only hand over.

What the two sides may rely on:
- Request ids are unique over all verbs of an owner: one id for PrepRecv and StartGenerate is REQUEST_ID_REUSED.
- Cancel is sent when a handler was cancelled before its answer, once for each such call. Calls that joined by a retry
  are counted: the work ends when the last of them is cancelled. A Cancel that crosses the answer of PrepRecv ends the
  reservation, because nobody has its address.
- A second StartGenerate with the key of a live sequence is refused through the listener under its own `call_id`, so
  that it is not taken for the end of the live one. A sequence whose deadline passes ends with `error`
  DEADLINE_EXCEEDED; a cancelled or aborted one with `finish_reason` CANCELLED.
- prompt_token_count 0 means the whole prompt. Lease and wait lengths are capped by the core.
- Before each push with a ready slot the core calls raise_ready(slot, 0), which must take effect before the service can
  read the slot for that push. Slots 0 .. TransferServiceReady.ready_slots-1 are handed out by the core alone.
- After TransferServiceLost the core counts every grant as drained and every push as ended; late answers about them are
  ignored. Answers of one port must arrive in order, TransferServiceLost after all of the incarnation it is about.
- cancel_push may be called for a push that has ended; end_attempt for an attempt that is committed: both do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from services.engine.core.guides import GuideState
from services.engine.sampling.params import SamplingParams
from services.engine.sampling.prompt_logprobs import PromptLogprobs
from services.protocol.address import KvAddress
from services.protocol.errors import ServiceError
from services.protocol.pages import PageCounts as PageCounts
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.timing import Timing

T = TypeVar("T")
Reply: TypeAlias = Callable[[T | ServiceError], None]


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A verb call: who asked, and their name for it. For logs: which of their clients' requests it is part of."""

    owner_id: str
    request_id: str
    client_request_id: str = field(default="", compare=False)


def writer_id(incarnation: bytes, key: RequestKey) -> str:
    """Name of a sender's attempts at the receiver's service: this engine's incarnation and the request."""
    # With its length, because an owner's name may hold anything, the separator too.
    return f"{incarnation.hex()}/{len(key.owner_id)}/{key.owner_id}/{key.request_id}"


@dataclass(frozen=True, slots=True)
class ReservationRef:
    """A reservation and the proof of the right to it."""

    reservation_id: str
    secret: bytes = field(repr=False)


# --- verbs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answer to PrepRecv."""

    address: KvAddress
    matched_tokens: int
    lease_s: float
    timing: Timing


@dataclass(frozen=True, slots=True)
class PrepRecv:
    """Reserve room for KV of prompt[:end]."""

    key: RequestKey
    prompt: tuple[int, ...]
    end: int
    cache_salt: str
    lease_s: float | None
    max_wait_s: float | None
    reply: Reply[Reserved]


@dataclass(frozen=True, slots=True)
class RemoteSend:
    """Put KV of prompt[range] into a peer's reservation. `deadline` is on the engine's clock, in seconds."""

    key: RequestKey
    prompt: tuple[int, ...]
    range: TokenRange
    address: KvAddress
    attempt: int
    cache_salt: str
    deadline: float | None
    reply: Reply[Timing]
    prompt_token_count: int = 0  # 0: all


@dataclass(frozen=True, slots=True)
class StartGenerate:
    """Generate from a prompt. Everything about it, refusals too, comes out through the listener.

    `deadline` is on the engine's clock, in seconds. `call_id` is the gRPC side's own and comes back in every output.
    """

    key: RequestKey
    prompt: tuple[int, ...]
    begin: int
    prompt_token_count: int
    sampling: SamplingParams
    reservation: ReservationRef | None
    cache_salt: str
    deadline: float | None
    forced: tuple[int, ...] = ()
    call_id: int = 0
    prompt_logprobs_begin: int = 0  # first position of the prompt to tell of, if sampling asks for any; 0 means 1


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller of a verb is gone or has lost interest. Unknown keys are ignored."""

    key: RequestKey


@dataclass(frozen=True, slots=True)
class Release:
    """End a reservation; answers the number of tokens published."""

    reservation: ReservationRef
    publish: bool
    reply: Reply[int]


@dataclass(frozen=True, slots=True)
class Renew:
    """Extend a lease; answers the granted length in seconds from now."""

    reservation: ReservationRef
    lease_s: float | None
    reply: Reply[float]


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancel whatever a request holds: its reservation, send or sequence."""

    key: RequestKey
    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class ReservationInfo:
    """A live reservation, without its secret."""

    reservation_id: str
    key: RequestKey
    state: str
    window: TokenRange
    committed: RangeSet
    lease_remaining_s: float
    page_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ListReservations:
    """List live reservations, oldest first; of one owner unless it is empty."""

    owner_id: str
    reply: Reply[tuple[ReservationInfo, ...]]


# --- answers of the KV transfer service --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GrantOpened:
    """The window is open for writing."""

    reservation_id: str


@dataclass(frozen=True, slots=True)
class GrantFailed:
    """The window could not be opened; certain that nothing writes."""

    reservation_id: str
    error: ServiceError


@dataclass(frozen=True, slots=True)
class GrantProgress:
    """What is committed under a grant, and whether a sender is at work."""

    reservation_id: str
    committed: RangeSet
    writing: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class GrantDrained:
    """Nothing writes under the grant any more, ever. `committed` is all that was; nothing if the service is gone."""

    reservation_id: str
    committed: RangeSet = field(default_factory=RangeSet)


@dataclass(frozen=True, slots=True)
class PushEnded:
    """A push is over: the source pages are read no more. `error` is None if all its bytes are in place."""

    push_id: int
    bytes: int
    committed: bool
    exposed_s: float
    error: ServiceError | None


@dataclass(frozen=True, slots=True)
class TransferServiceLost:
    """The service's process is known gone: nothing it was asked to write or read goes on."""


@dataclass(frozen=True, slots=True)
class TransferServiceReady:
    """A (new) incarnation of the service has the pool; grants of the old one do not exist in it."""

    endpoint: str
    pool_id: str
    epoch: bytes
    ready_slots: int


# --- answer of whoever compiles guides -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GuideReady:
    """The guide of sequence `number` can be followed from the tokens that it has, or cannot."""

    number: int
    outcome: GuideState | ServiceError


# --- state of the engine -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work; reply when the last sequence and send have ended."""

    reply: Reply[None]


@dataclass(frozen=True, slots=True)
class WatchCache:
    """Deliver a snapshot of the prefix cache now and its changes from then on to `on_event`."""

    watcher_id: int
    on_event: Callable[[CacheEvent], None]


@dataclass(frozen=True, slots=True)
class UnwatchCache:
    """Deliver no more."""

    watcher_id: int


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Blocks that entered and left the prefix cache; sequence numbers of one engine are consecutive."""

    sequence: int
    snapshot: bool
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


Command: TypeAlias = (
    PrepRecv | RemoteSend | StartGenerate | Cancel | Release | Renew | Abort | ListReservations
    | GrantOpened | GrantFailed | GrantProgress | GrantDrained | PushEnded
    | TransferServiceLost | TransferServiceReady | GuideReady | Drain | WatchCache | UnwatchCache
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WorkDone:
    """What all steps so far did; see engine.v1.WorkDone."""

    busy_s: float = 0.0
    prompt_tokens: int = 0
    prompt_context: int = 0
    rows: int = 0
    row_context: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """The engine's load after a step or command; see engine.v1.WatchLoadResponse."""

    running_sequences: int
    waiting_sequences: int
    waiting_for_kv: int
    queued_tokens: int
    context_tokens: int
    reservations: int
    pages: PageCounts
    steps: int
    draining: bool
    work: WorkDone = WorkDone()


class FinishReason:
    """Names of engine.v1 finish reasons without the prefix."""

    STOP = "STOP"
    LENGTH = "LENGTH"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities of the chosen token and of the best ones."""

    chosen: tuple[int, float]
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one sequence produced in one step. The last one has `finish_reason` or `error`, and then `timing`."""

    key: RequestKey
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    error: ServiceError | None = None
    timing: Timing | None = None
    call_id: int = 0
    prompt_logprobs: PromptLogprobs | None = None  # of the next tokens of the prompt

    @property
    def has_news(self) -> bool:
        """Whether it says more than that the sequence has ended."""
        return bool(self.token_ids) or self.prompt_logprobs is not None
