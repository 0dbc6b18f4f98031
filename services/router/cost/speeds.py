"""How fast an engine computes and a pair of engines moves KV, fitted to the accounts of ended verbs."""

from __future__ import annotations

from dataclasses import dataclass

from services.router.cost.least_squares import LeastSquares

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
    beside: float  # sequences that decode meanwhile

    @property
    def features(self) -> tuple[float, ...]:
        """A constant, the tokens, what attention reads, and what decoding takes from it."""
        return 1.0, self.tokens, self.tokens * (self.context + self.tokens / 2), self.tokens * self.beside


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """One decoding step."""

    sequences: float
    context: float  # tokens of all of them

    @property
    def features(self) -> tuple[float, ...]:
        """A constant (the weights are read once), the sequences, and what attention reads."""
        return 1.0, self.sequences, self.context


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
    """One incarnation of an engine."""

    def __init__(self, like: EngineSpeeds | None = None) -> None:
        """`like`: an engine that serves the same model, to start from."""
        prefill, decode, reserve = [0.0, PREFILL_S_PER_TOKEN, 0.0, 0.0], [STEP_S, STEP_S / 10, 0.0], [RESERVE_S]
        if like is not None:
            prefill, decode, reserve = (each.coefficients for each in (like.prefill, like.decode, like.reserve))
        token_s, step_s = max(prefill[1], 1e-7), max(decode[0], 1e-5)
        self.prefill: LeastSquares = LeastSquares(prefill, (step_s, 3 * token_s, token_s / 1e3, token_s / 10))
        self.decode: LeastSquares = LeastSquares(decode, (3 * step_s, step_s / 4, step_s / 1e4))
        self.reserve: LeastSquares = LeastSquares(reserve, (RESERVE_S,))

    def prefill_s(self, work: PrefillWork) -> float:
        """Seconds from the first of its tokens being scheduled to the last being computed."""
        return self.prefill.predict(work.features) if work.tokens else 0.0

    def step_s(self, work: DecodeWork) -> float:
        """Seconds between two tokens of one sequence."""
        return self.decode.predict(work.features)

    def wait_s(self, queued_tokens: int) -> float:
        """Seconds until so many prompt tokens, of others, have been computed."""
        return queued_tokens * self.prefill.coefficients[1]

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
