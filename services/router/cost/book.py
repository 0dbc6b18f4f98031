"""All that was measured of the fleet: speeds of engines and links, and how long answers are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from services.protocol.ranges import TokenRange
from services.router.cost.speeds import DecodeWork, EngineSpeeds, LinkSpeed, PrefillWork, SendWork
from services.router.fleet.info import EngineSnapshot
from services.router.request import PolicyRequest
from services.router.values import Timing

MAX_ENGINES = 8192
MAX_LINKS = 65536
MAX_MODELS = 1024
FIRST_GUESS_OUTPUT = 64.0  # tokens
_OUTPUT_WEIGHT = 0.05  # of the newest answer in the running mean

Key = TypeVar("Key")
Value = TypeVar("Value")
EngineKey = tuple[str, bytes]  # address, incarnation: one that restarts may be another machine


@dataclass(frozen=True, slots=True)
class GenerationEnd:
    """A start_generate that has ended well."""

    begin: EngineSnapshot
    beside: int  # other sequences there when it began
    sequences: float  # there on average while it decoded, itself among them
    context_tokens: float  # of all of them
    prompt_tokens: int
    timing: Timing


class CostBook:
    """Keeps a model for each engine and pair that was used, the latest MAX_ENGINES and MAX_LINKS of them."""

    def __init__(self) -> None:
        self._engines: OrderedDict[EngineKey, EngineSpeeds] = OrderedDict()
        self._links: OrderedDict[tuple[EngineKey, EngineKey], LinkSpeed] = OrderedDict()
        # By model digest: what a new engine is taken to be like.
        self._latest: OrderedDict[bytes, EngineSpeeds] = OrderedDict()
        self._mean_output = FIRST_GUESS_OUTPUT

    def engine(self, engine: EngineSnapshot) -> EngineSpeeds:
        """Speeds of an engine. One without observations is like the last that was observed with the same model."""
        found = self._engines.get(_key(engine))
        return found or self._latest.get(engine.info.model.digest) or _UNKNOWN_ENGINE

    def link(self, sender: EngineSnapshot, receiver: EngineSnapshot) -> LinkSpeed:
        """Speed of a pair."""
        return self._links.get((_key(sender), _key(receiver)), _UNKNOWN_LINK)

    def expected_output(self, request: PolicyRequest) -> float:
        """Tokens that it will probably generate: as many as others lately, at most what it asked for."""
        limit = float(request.sampling.max_tokens or self._mean_output)
        total = limit if request.sampling.ignore_eos else min(limit, self._mean_output)
        return max(1.0, total - request.num_generated)

    @property
    def mean_output(self) -> float:
        """Tokens of an answer, of late."""
        return self._mean_output

    def reserved(self, engine: EngineSnapshot, seconds: float) -> None:
        """A prep_recv has ended well."""
        if seconds > 0:
            self._observed(engine).reserve.observe((1.0,), seconds)

    def sent(
        self, sender: EngineSnapshot, receiver: EngineSnapshot, tokens: TokenRange, timing: Timing, elapsed_s: float
    ) -> None:
        """A remote_send has ended well; snapshots are of its beginning."""
        computed = timing.computed_tokens
        self._prefilled(sender, timing, tokens.end - computed, sender.sequences)
        seconds = elapsed_s - timing.queue_s - timing.prefill_s
        if seconds > 0:
            moved = min(computed, len(tokens))
            work = SendWork(cached=len(tokens) - moved, computed=moved)
            key = (_key(sender), _key(receiver))
            _touch(self._links, key, LinkSpeed, MAX_LINKS).observe(work, seconds, timing.transferred_bytes)

    def generated(self, end: GenerationEnd, per_token_s: float) -> None:
        """A start_generate has ended well; `per_token_s` between its tokens after the first, 0 if there was but one."""
        timing = end.timing
        self._prefilled(end.begin, timing, end.prompt_tokens - timing.computed_tokens, end.beside)
        self._mean_output += _OUTPUT_WEIGHT * (timing.generated_tokens - self._mean_output)
        if per_token_s > 0 and not timing.num_preemptions:
            own = end.prompt_tokens + timing.generated_tokens / 2
            work = DecodeWork(end.sequences, max(own, end.context_tokens))
            self._observed(end.begin).decode.observe(work.features, per_token_s)

    def _prefilled(self, engine: EngineSnapshot, timing: Timing, context: int, beside: int) -> None:
        if timing.computed_tokens and timing.prefill_s > 0 and not timing.num_preemptions:
            work = PrefillWork(timing.computed_tokens, max(0, context), beside)
            self._observed(engine).prefill.observe(work.features, timing.prefill_s)

    def _observed(self, engine: EngineSnapshot) -> EngineSpeeds:
        model = engine.info.model.digest
        speeds = _touch(self._engines, _key(engine), lambda: EngineSpeeds(self._latest.get(model)), MAX_ENGINES)
        _touch(self._latest, model, lambda: speeds, MAX_MODELS)
        self._latest[model] = speeds
        return speeds


def _key(engine: EngineSnapshot) -> EngineKey:
    return engine.address, engine.info.incarnation


def _touch(kept: OrderedDict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """The model of that key, made if there is none; the one that was not observed for longest goes."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
    return kept[key]


_UNKNOWN_ENGINE = EngineSpeeds()
_UNKNOWN_LINK = LinkSpeed()
