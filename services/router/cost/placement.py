"""Every way to place one request over the fleet, with what each would cost.

Pure functions of what is known now.

A placement is an engine D that decodes, and perhaps an engine P that provides KV of the prompt's first `split` tokens,
computed or from its cache. So all patterns are one family: no P is data parallel, or the bypass for a context that D
has cached; split = len - 1 is disaggregated; in between it is balanced; and where P has all of it cached, it is a
migration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter
from typing import TypeAlias

from services.router.cost.book import CostBook
from services.router.cost.least_squares import RELATIVE_NOISE
from services.router.cost.outlook import Outlook
from services.router.cost.speeds import DecodeWork, EngineSpeeds, PrefillWork, SendWork
from services.router.errors import NoEngine
from services.router.fleet.info import EngineSnapshot
from services.router.request import PolicyRequest

# With many engines only the best few of each kind are combined: most pairs are worse than these by their parts already.
MAX_PROVIDERS = 2
MAX_RECEIVERS = 2
SHORTLIST = 3  # engines of each kind that a placement is sought among, see Roster.shortlist
MAX_SPLIT_PAIRS = 2  # pairs of engines for which the best split is sought
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

    `delay_s` is the time that it costs others: the sum over the sequences beside it, and over prompts to come. Their
    time is worth as much as this request's own, so `cost_s`, the sum of both, is what is minimised.
    """

    pattern: Pattern
    decode: EngineSnapshot
    prefill: EngineSnapshot | None
    split: int  # tokens of the prompt that `prefill` provides
    hold_s: float  # for which the request is kept back in all, until sequences beside it have ended
    wait_s: float
    compute_s: float  # of the prompt, on both engines
    transfer_s: float  # reserving and sending
    decode_s: float
    delay_s: float

    @property
    def ttft_s(self) -> float:
        """Expected time to the first token."""
        return self.hold_s + self.wait_s + self.compute_s + self.transfer_s

    @property
    def jct_s(self) -> float:
        """Expected time to the last token."""
        return self.ttft_s + self.decode_s

    @property
    def cost_s(self) -> float:
        """What is minimised."""
        return self.jct_s + self.delay_s


_Ranked: TypeAlias = tuple[tuple[bool, float], Placement]  # the least comes first


class _Site:
    """An engine for one request, and what does not depend on where else it could go."""

    __slots__ = (
        "cached",
        "decode_delay_s",
        "decode_s",
        "engine",
        "left",
        "sequences",
        "speeds",
        "step_s",
        "wait_s",
    )

    def __init__(
        self,
        engine: EngineSnapshot,
        speeds: EngineSpeeds,
        cached: int,
        length: int,
        output: float,
        others_output: float,
        outlook: Outlook,
    ) -> None:
        """`length`: tokens of the prompt; `output`: those that the request generates; `others_output`: those of a
        sequence of another router."""
        self.engine = engine
        self.speeds = speeds
        self.cached = cached  # tokens of the prompt
        self.wait_s = _wait_s(engine, speeds)
        foreign = engine.others.sequences
        self.left = sorted(answer.left for answer in engine.underway.answers)  # tokens of each of ours
        self.sequences = len(self.left) + foreign
        # Tokens that they will generate beside those of the request.
        beside = foreign * min(output, others_output) + sum(min(output, left) for left in self.left)
        context = engine.load.context_tokens / max(1, engine.load.sequences)  # of each
        self.step_s = speeds.step_s(DecodeWork(self.sequences, self.sequences * context))
        empty_s = speeds.step_s(DecodeWork(0, 0))
        own_s = speeds.step_s(DecodeWork(1, length + output / 2)) - empty_s
        other_s = speeds.step_s(DecodeWork(1, context)) - empty_s
        alone_s = max(0.0, output - 1) * (empty_s + own_s) + beside * other_s
        # Prompts to come will take their share of the time.
        self.decode_s = alone_s * outlook.slowdown(engine.address)
        # This sequence makes the steps of others longer while they are there.
        self.decode_delay_s = beside * own_s


def _wait_s(engine: EngineSnapshot, speeds: EngineSpeeds) -> float:
    """Seconds until the prompts of others have been computed."""
    tokens, elapsed_s = engine.underway.head
    rest = engine.underway.prompt_tokens - tokens + engine.others.prompt_tokens
    return max(0.0, speeds.wait_s(tokens) - elapsed_s) + speeds.wait_s(rest)


class Planner:
    """Weighs the placements of one request."""

    def __init__(
        self,
        book: CostBook,
        request: PolicyRequest,
        engines: Sequence[EngineSnapshot],
        outlook: Outlook,
        held_s: float = 0.0,
    ) -> None:
        """`held_s`: for how long the request has been kept back already. NoEngine where there are no engines."""
        if not engines:
            raise NoEngine("no healthy engine serves this model", retry_delay_s=1.0)
        self._book = book
        self._outlook = outlook
        self._held_s = held_s
        self._length = len(request.prompt)
        self._num_movable = request.num_movable
        self._output = book.expected_output(request)
        self._sites = [self._site(each, request) for each in engines]

    def _site(self, engine: EngineSnapshot, request: PolicyRequest) -> _Site:
        cached = min(engine.cached_prefix(request), self._num_movable, self._length - 1)
        # Half done on average.
        speeds, others_output = self._book.engine(engine), self._book.mean_output(engine.info.model.digest) / 2
        return _Site(engine, speeds, cached, self._length, self._output, others_output, self._outlook)

    def placements(self) -> list[Placement]:
        """All that are worth a look, the cheapest first. Those that find too few free pages come last."""
        ranked = [self._ranked(site, self._alone(site)) for site in self._sites]
        ranked += self._pairs()
        ranked.sort(key=itemgetter(0))
        return [placement for _, placement in ranked]

    def _alone(self, site: _Site) -> Placement:
        """All on one engine."""
        compute_s, decode_s, delay_s = self._decoding(site, site.cached)
        hold_s, saved_s = self._hold(site, compute_s)
        pattern = Pattern.CACHED if 2 * site.cached >= self._length else Pattern.DATA_PARALLEL
        return Placement(
            pattern,
            site.engine,
            None,
            0,
            self._held_s + hold_s,
            site.wait_s,
            compute_s,
            0.0,
            decode_s,
            delay_s - saved_s,
        )

    def _hold(self, site: _Site, compute_s: float) -> tuple[float, float]:
        """(seconds to keep the request back from now on, delay of others that this saves): sequences that are about to
        end are better not held up by its prompt. Never longer, in all, than the prompt takes."""
        most_s, best = compute_s - self._held_s, (0.0, 0.0)
        if site.wait_s > 0:  # the prompts of others hold them up anyway
            return best
        for ended, left in enumerate(site.left, 1):
            hold_s, saved_s = left * site.step_s, ended * (compute_s - site.step_s)
            if hold_s <= most_s and saved_s - DOUBT * hold_s > best[1] - DOUBT * best[0]:
                best = hold_s, saved_s
        return best

    def _split(self, provider: _Site, receiver: _Site, split: int) -> Placement:
        """`provider` computes prompt[:split] or has it cached and sends what `receiver` lacks; that one does the
        rest."""
        there = min(provider.cached, split)
        missing = split - receiver.cached
        computed = split - there
        added_s = provider.speeds.prefill_s(PrefillWork(computed, there))
        provider_s = provider.step_s + added_s if computed else 0.0
        moved = min(computed, missing)
        link = self._book.link(provider.engine, receiver.engine)
        transfer_s = receiver.speeds.reserve_s + link.send_s(SendWork(cached=missing - moved, computed=moved))
        wait_s = provider.wait_s if computed else 0.0
        ready_s = wait_s + provider_s + transfer_s
        # Its queue gets shorter while the KV is on its way.
        more_wait_s = max(0.0, receiver.wait_s - ready_s)
        compute_s, decode_s, delay_s = self._decoding(receiver, split)
        return Placement(
            self._pattern(computed, split),
            receiver.engine,
            provider.engine,
            split,
            self._held_s,
            wait_s + more_wait_s,
            provider_s + compute_s,
            transfer_s,
            decode_s,
            delay_s + self._held_up_s(provider, added_s),
        )

    def _pairs(self) -> list[_Ranked]:
        """Of many pairs only the most promising ones, and of these only the best with every split."""
        if self._num_movable < self._length:  # it is computed where it is generated from
            return []
        able, last = [site for site in self._sites if site.engine.info.can_transfer], self._length - 1
        by_cache = sorted(able, key=lambda site: -site.cached)[:1]
        by_time = sorted(able, key=self._provide_cost_s)[:MAX_PROVIDERS]
        receivers = sorted(able, key=lambda site: sum(self._decoding(site, last)))[:MAX_RECEIVERS]
        pairs = {(one, other): None for one in (*by_cache, *by_time) for other in receivers if one is not other}
        whole = [
            (self._ranked(other, self._split(one, other, last)), one, other)
            for one, other in pairs
            if other.cached < last
        ]
        whole.sort(key=lambda each: each[0][0])
        ranked = [each for each, _, _ in whole]
        for _, one, other in whole[:MAX_SPLIT_PAIRS]:
            ranked += [self._ranked(other, self._split(one, other, split)) for split in self._splits(one, other)]
        return ranked

    def _splits(self, provider: _Site, receiver: _Site) -> list[int]:
        """Whole pages, so that no page is filled by both; all but the last token is another matter."""
        last, page = self._length - 1, receiver.engine.info.page_size
        shares = {min(last, self._length * share // NUM_SPLITS // page * page) for share in range(1, NUM_SPLITS)}
        shares.add(min(last, provider.cached // page * page))
        return sorted(share for share in shares if receiver.cached < share < last)

    def _provide_cost_s(self, site: _Site) -> float:
        """Seconds until an engine would have the whole prompt, and what that delays others there."""
        added_s = site.speeds.prefill_s(PrefillWork(self._length - site.cached, site.cached))
        return site.wait_s + added_s + self._held_up_s(site, added_s)

    def _decoding(self, site: _Site, ready: int) -> tuple[float, float, float]:
        """(computing prompt[ready:], generating, what that delays others there) in seconds."""
        added_s = site.speeds.prefill_s(PrefillWork(self._length - ready, ready))
        # Its prompt holds all of them up once.
        return site.step_s + added_s, site.decode_s, self._held_up_s(site, added_s) + site.decode_delay_s

    def _held_up_s(self, site: _Site, added_s: float) -> float:
        """By how much computing a prompt for so long delays others there: all that decode, and those to come."""
        behind = self._outlook.num_behind(site.engine.address, site.wait_s, added_s)
        return (site.sequences + behind) * added_s

    def _pattern(self, computed: int, split: int) -> Pattern:
        if not computed:
            return Pattern.MIGRATION
        return Pattern.DISAGGREGATED if split == self._length - 1 else Pattern.BALANCED

    def _ranked(self, site: _Site, placement: Placement) -> _Ranked:
        """Without enough pages a request is refused, or waits for as long as others please."""
        engine = site.engine
        pages = -(-(self._length - site.cached) // engine.info.page_size)
        # Of what an answer takes once its KV is there nobody doubts.
        doubt = 0.0 if placement.prefill is None else (DOUBT - 1) * (placement.cost_s - placement.decode_s)
        return (pages > engine.load.usable_pages, placement.cost_s + doubt), placement
