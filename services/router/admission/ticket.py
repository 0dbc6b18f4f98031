"""What admission knows of a request, and how much it may let in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from services.router.request import ModelKey


class Priority(Enum):
    """Classes of requests by their share of the work where all of them wait."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def weight(self) -> int:
        """A class that gets little is not starved: its requests still have deadlines."""
        return {Priority.HIGH: 16, Priority.NORMAL: 4, Priority.LOW: 1}[self]


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request that wants to begin."""

    model: ModelKey
    num_prompt_tokens: int
    max_tokens: int = 0  # of an answer; 0: not bounded by the client
    priority: Priority = Priority.NORMAL
    tenant: str = ""  # those of one tenant share its part; requests without one share one part together
    deadline: float = float("inf")  # on the event loop's clock
    room: float = float("inf")  # tokens of an answer that the model's context leaves after the prompt
    follows: bool = False  # another answer to a prompt that has begun, so it does not queue

    def cost(self, usual_output: float, ratio: float = 1.0) -> float:
        """Work in tokens that is expected, for fairness."""
        return self.work(self.expected_output(usual_output, ratio))

    def work(self, num_tokens: float) -> float:
        """Of an answer with so many tokens. The prompt is the first answer's alone."""
        return num_tokens if self.follows else self.num_prompt_tokens + num_tokens

    def expected_output(self, usual_output: float, ratio: float = 1.0) -> float:
        """Tokens that an answer may have, at least 1: `usual_output` of one that the client does not bound, and `ratio`
        times as many where answers are like that, but never more than the client and the context allow."""
        most = min(self.max_tokens or self.room, self.room)
        return max(1.0, min((self.max_tokens or usual_output) * ratio, most))


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """`max_requests` are waiting and running together; `max_queued` wait in each class, for `queue_s` at most. Prompts
    that the fleet has not computed are at most what it computes in `prompt_s`, or `min_prompt_tokens` an engine."""

    max_requests: int = 1024
    max_queued: int = 256
    queue_s: float = 5.0
    prompt_s: float = 2.0
    min_prompt_tokens: int = 2048


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a model's engines can take in all, and what others than this router have them do."""

    num_engines: int = 0
    sequences: int = 0  # computed at once
    others_sequences: int = 0
    others_prompt_tokens: int = 0  # not computed yet
