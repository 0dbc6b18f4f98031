"""Every way to place one request over the fleet, with what each would cost.

Pure functions of what is known now.

A placement is an engine D that decodes, and perhaps an engine P that provides KV of the prompt's first `split` tokens,
computed or from its cache. So all patterns are one family: no P is data parallel, or the bypass for a context that D
has cached; split = len - 1 is disaggregated; in between it is balanced; and where P has all of it cached, it is a
migration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from services.router.cost.book import CostBook
from services.router.cost.least_squares import RELATIVE_NOISE
from services.router.cost.speeds import DecodeWork, PrefillWork, SendWork
from services.router.errors import NoEngine
from services.router.fleet.info import EngineSnapshot
from services.router.request import PolicyRequest

# With many engines only the best few of each kind are combined: most pairs are worse than these by their parts already.
MAX_PROVIDERS = 4
MAX_RECEIVERS = 4
DOUBT = 1 + RELATIVE_NOISE  # more verbs, more that can go wrong: they must promise to be better by more than noise
NUM_SPLITS = 8  # shares of the prompt that are tried as split, in eighths


class Pattern(Enum):
    """What a placement is called."""

    DATA_PARALLEL = "data_parallel"
    CACHED = "cached"  # data parallel where most of the prompt is cached
    DISAGGREGATED = "disaggregated"
    BALANCED = "balanced"
    MIGRATION = "migration"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs and what is expected of it. Times in seconds.

    `delay_s` is the time that it costs others: the sum over the sequences beside it. Their time is worth as much as
    this request's own, so `cost_s`, the sum of both, is what is minimised.
    """

    pattern: Pattern
    decode: EngineSnapshot
    prefill: EngineSnapshot | None
    split: int  # tokens of the prompt that `prefill` provides
    wait_s: float
    compute_s: float  # of the prompt, on both engines
    transfer_s: float  # reserving and sending
    decode_s: float
    delay_s: float

    @property
    def ttft_s(self) -> float:
        """Expected time to the first token."""
        return self.wait_s + self.compute_s + self.transfer_s

    @property
    def jct_s(self) -> float:
        """Expected time to the last token."""
        return self.ttft_s + self.decode_s

    @property
    def cost_s(self) -> float:
        """What is minimised."""
        return self.jct_s + self.delay_s


class Planner:
    """Weighs the placements of one request."""

    def __init__(self, book: CostBook, request: PolicyRequest, engines: Sequence[EngineSnapshot]) -> None:
        """NoEngine where there are no engines."""
        if not engines:
            raise NoEngine("no healthy engine serves this model", retry_delay_s=1.0)
        self._book = book
        self._request = request
        self._engines = engines
        self._length = len(request.prompt)
        self._output = book.expected_output(request)
        self._cached = {each.address: min(each.cached_prefix(request), self._length - 1) for each in engines}

    def placements(self) -> list[Placement]:
        """All that are worth a look, the cheapest first. Those that find too few free pages come last."""
        alone = sorted(map(self.alone, self._engines), key=self._rank)
        placements = [*alone, *self._pairs(alone)]
        return sorted(placements, key=self._rank)

    def alone(self, engine: EngineSnapshot) -> Placement:
        """All on one engine."""
        cached = self._cached[engine.address]
        wait_s = self._book.engine(engine).wait_s(engine.prompt_tokens)
        compute_s, decode_s, delay_s = self._decoding(engine, cached)
        pattern = Pattern.CACHED if 2 * cached >= self._length else Pattern.DATA_PARALLEL
        return Placement(pattern, engine, None, 0, wait_s, compute_s, 0.0, decode_s, delay_s)

    def split(self, provider: EngineSnapshot, receiver: EngineSnapshot, split: int) -> Placement:
        """`provider` computes prompt[:split] or has it cached and sends what `receiver` lacks; that one does the
        rest."""
        speeds, there = self._book.engine(provider), min(self._cached[provider.address], split)
        missing = split - self._cached[receiver.address]
        computed = split - there
        added_s = speeds.prefill_s(PrefillWork(computed, there))
        provider_s = self._step_s(provider) + added_s if computed else 0.0
        moved = min(computed, missing)
        send_s = self._book.link(provider, receiver).send_s(SendWork(cached=missing - moved, computed=moved))
        transfer_s = self._book.engine(receiver).reserve_s + send_s
        wait_s = speeds.wait_s(provider.prompt_tokens) if computed else 0.0
        ready_s = wait_s + provider_s + transfer_s
        # Its queue gets shorter while the KV is on its way.
        more_wait_s = max(0.0, self._book.engine(receiver).wait_s(receiver.prompt_tokens) - ready_s)
        compute_s, decode_s, delay_s = self._decoding(receiver, split)
        return Placement(
            self._pattern(computed, split),
            receiver,
            provider,
            split,
            wait_s + more_wait_s,
            provider_s + compute_s,
            transfer_s,
            decode_s,
            delay_s + provider.sequences * added_s,
        )

    def _pairs(self, alone: Sequence[Placement]) -> Iterator[Placement]:
        able = [each.decode for each in alone if each.decode.info.can_transfer]
        by_cache = sorted(able, key=lambda each: -self._cached[each.address])[:2]
        by_time = sorted(able, key=self._provide_s)[:MAX_PROVIDERS]
        by_decoding = sorted(able, key=lambda each: sum(self._decoding(each, self._length - 1)))[:MAX_RECEIVERS]
        for provider in {each.address: each for each in (*by_cache, *by_time)}.values():
            for receiver in by_decoding:
                if provider.address != receiver.address:
                    for split in self._splits(provider, receiver):
                        yield self.split(provider, receiver, split)

    def _splits(self, provider: EngineSnapshot, receiver: EngineSnapshot) -> list[int]:
        """Whole pages, so that no page is filled by both; and all but the last token."""
        last, page = self._length - 1, receiver.info.page_size
        shares = {min(last, self._length * share // NUM_SPLITS // page * page) for share in range(1, NUM_SPLITS)}
        shares |= {last, min(last, self._cached[provider.address] // page * page)}
        return sorted(share for share in shares if share > self._cached[receiver.address])

    def _provide_s(self, engine: EngineSnapshot) -> float:
        """Seconds until an engine would have the whole prompt."""
        speeds, there = self._book.engine(engine), self._cached[engine.address]
        return speeds.wait_s(engine.prompt_tokens) + speeds.prefill_s(PrefillWork(self._length - there, there))

    def _step_s(self, engine: EngineSnapshot) -> float:
        """Seconds of a step there as it is, with nothing of this request."""
        return self._book.engine(engine).step_s(DecodeWork(engine.sequences, engine.load.context_tokens))

    def _decoding(self, engine: EngineSnapshot, ready: int) -> tuple[float, float, float]:
        """(computing prompt[ready:], generating, what that delays others there) in seconds."""
        speeds, beside = self._book.engine(engine), engine.sequences
        added_s, without_s = speeds.prefill_s(PrefillWork(self._length - ready, ready)), self._step_s(engine)
        context = engine.load.context_tokens
        step_s = speeds.step_s(DecodeWork(beside + 1, context + self._length + self._output / 2))
        decode_s = max(0.0, self._output - 1) * step_s
        # Others are half done on average. While they are there, this sequence makes each of their steps longer, and its
        # prompt holds all of them up once.
        together = min(self._output, self._book.mean_output / 2)
        delay_s = beside * (added_s + together * max(0.0, step_s - without_s))
        return without_s + added_s, decode_s, delay_s

    def _pattern(self, computed: int, split: int) -> Pattern:
        if not computed:
            return Pattern.MIGRATION
        return Pattern.DISAGGREGATED if split == self._length - 1 else Pattern.BALANCED

    def _rank(self, placement: Placement) -> tuple[bool, float]:
        """Without enough pages a request is refused, or waits for as long as others please."""
        engine = placement.decode
        pages = -(-(self._length - self._cached[engine.address]) // engine.info.page_size)
        doubt = 1.0 if placement.prefill is None else DOUBT
        return pages > engine.load.usable_pages > 0, doubt * placement.cost_s
