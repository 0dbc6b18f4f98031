"""How fast an engine computes, fitted to what it tells of its steps, and a pair of engines moves KV, fitted to ended
sends."""

from __future__ import annotations

from dataclasses import dataclass

from services.router.cost.least_squares import LeastSquares
from services.router.fleet.info import WorkDone

# Where nothing is known yet: the right order of magnitude for something between a CPU core and a GPU is enough, because
# the first observations count for nearly all.
PREFILL_S_PER_TOKEN = 5e-4
STEP_S = 2e-2
SEND_S = 5e-3
SEND_S_PER_TOKEN = 1e-5
RESERVE_S = 3e-3


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Prompt tokens that an engine computes in one go."""

    tokens: int
    context: int  # tokens before them whose KV is there


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """One decoding step."""

    sequences: float
    context: float  # tokens of all of them


@dataclass(frozen=True, slots=True)
class StepsWork:
    """Any number of steps. In each, an engine computes pieces of prompts and a token of every sequence that decodes."""

    steps: float
    prompt_tokens: float = 0.0
    prompt_context: float = 0.0  # tokens before each of them, summed
    rows: float = 0.0  # tokens of sequences that decode
    row_context: float = 0.0  # tokens before each of these, summed

    @classmethod
    def between(cls, begin: WorkDone, end: WorkDone) -> StepsWork:
        """What was done from one report to the next."""
        return cls(
            end.steps - begin.steps,
            end.prompt_tokens - begin.prompt_tokens,
            end.prompt_context - begin.prompt_context,
            end.rows - begin.rows,
            end.row_context - begin.row_context,
        )

    def __add__(self, other: StepsWork) -> StepsWork:
        """Both."""
        return StepsWork(*(one + more for one, more in zip(self.features, other.features, strict=True)))

    def __mul__(self, factor: float) -> StepsWork:
        """So many times as much."""
        return StepsWork(*(factor * each for each in self.features))

    @property
    def features(self) -> tuple[float, ...]:
        """Time is linear in each: the weights are read once a step, a token is so many products, and attention reads
        what is before it."""
        return self.steps, self.prompt_tokens, self.prompt_context, self.rows, self.row_context


@dataclass(frozen=True, slots=True)
class SendWork:
    """KV that goes to a peer."""

    cached: int  # tokens that are only moved
    computed: int  # tokens that are moved while later ones are computed

    @property
    def features(self) -> tuple[float, ...]:
        """A constant for the calls, and either kind of tokens."""
        return 1.0, self.cached, self.computed


class EngineSpeeds:
    """One incarnation of an engine, or all that serve a model."""

    def __init__(self, alike: EngineSpeeds | None = None) -> None:
        """`alike`: of all engines that serve the same model, to start from."""
        steps, reserve = [STEP_S, PREFILL_S_PER_TOKEN, 0.0, STEP_S / 10, 0.0], [RESERVE_S]
        if alike is not None:
            steps, reserve = alike.steps.coefficients, alike.reserve.coefficients
        step_s, token_s = max(steps[0], 1e-5), max(steps[1], 1e-7)
        spread = (3 * step_s, 3 * token_s, token_s / 1e3, step_s / 4, step_s / 1e4)
        self.steps: LeastSquares = LeastSquares(steps, spread)
        self.reserve: LeastSquares = LeastSquares(reserve, (RESERVE_S,))

    def prefill_s(self, work: PrefillWork) -> float:
        """Seconds by which computing that makes steps longer which are done anyway."""
        _, token_s, context_s, _, _ = self.steps.coefficients
        return work.tokens * (token_s + context_s * (work.context + work.tokens / 2))

    def step_s(self, work: DecodeWork) -> float:
        """Seconds between two tokens of one sequence."""
        each_s, _, _, row_s, context_s = self.steps.coefficients
        return each_s + row_s * work.sequences + context_s * work.context

    def wait_s(self, queued_tokens: int) -> float:
        """Seconds until so many prompt tokens, of others, have been computed."""
        return self.prefill_s(PrefillWork(queued_tokens, 0))

    @property
    def reserve_s(self) -> float:
        """Seconds that prep_recv takes."""
        return self.reserve.coefficients[0]


class LinkSpeed:
    """From one engine to another. What it predicts is what a send takes beyond waiting and computing: moving KV that is
    cached, the last layers of what is computed, and the calls."""

    def __init__(self) -> None:
        self.send = LeastSquares((SEND_S, SEND_S_PER_TOKEN, 0.0), (4 * SEND_S, 10 * SEND_S_PER_TOKEN, SEND_S_PER_TOKEN))
        self._bytes_per_token = 0.0

    def observe(self, work: SendWork, seconds: float, num_bytes: int) -> None:
        """A send has ended."""
        self.send.observe(work.features, seconds)
        if work.cached + work.computed:
            self._bytes_per_token = num_bytes / (work.cached + work.computed)

    def send_s(self, work: SendWork) -> float:
        """Seconds."""
        return self.send.predict(work.features)

    @property
    def bytes_per_s(self) -> float | None:
        """Bandwidth for KV that is cached; None before anything was sent."""
        seconds = self.send.coefficients[1]
        return self._bytes_per_token / seconds if self._bytes_per_token and seconds else None
