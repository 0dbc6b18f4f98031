"""All that was measured of the fleet: speeds of engines and links, and how long answers are."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.clock import now
from services.router.cost.outlook import Flow, Outlook, look
from services.router.cost.speeds import EngineSpeeds, LinkSpeed, SendWork, StepsWork
from services.router.fleet.info import EngineSnapshot, WorkDone
from services.router.request import PolicyRequest

MAX_ENGINES = 8192
MAX_LINKS = 65536
MAX_MODELS = 1024
FIRST_GUESS_OUTPUT = 64.0  # tokens
LOOK_S = 1.0  # outlooks change slowly, and one takes a look at every engine
_OUTPUT_WEIGHT = 0.05  # of the newest answer in the running mean

Key = TypeVar("Key")
Value = TypeVar("Value")
EngineKey = tuple[str, bytes]  # address, incarnation: one that restarts may be another machine


class CostBook:
    """Keeps a model for each engine and pair that was used, the latest MAX_ENGINES and MAX_LINKS of them."""

    def __init__(self, clock: Callable[[], float] = now) -> None:
        self._clock = clock
        self._engines: OrderedDict[EngineKey, EngineSpeeds] = OrderedDict()
        self._links: OrderedDict[tuple[EngineKey, EngineKey], LinkSpeed] = OrderedDict()
        self._reports: OrderedDict[EngineKey, WorkDone] = OrderedDict()  # the last of each
        self._alike: OrderedDict[bytes, EngineSpeeds] = OrderedDict()  # all engines of a model, by its digest
        self._flows: OrderedDict[EngineKey, Flow] = OrderedDict()
        self._outlooks: OrderedDict[bytes, tuple[float, Outlook]] = OrderedDict()  # by the model's digest, with when
        self._outputs: OrderedDict[bytes, float] = OrderedDict()  # mean tokens of an answer, by the model's digest

    def engine(self, engine: EngineSnapshot) -> EngineSpeeds:
        """Speeds of an engine: those of all with the same model, unless it is clearly different. Fits of two equal
        engines differ by the noise of their steps, and the one that seems quicker would get too much to do."""
        own, alike = self._engines.get(_key(engine)), self._alike.get(engine.info.model.digest)
        if own is None or alike is None:
            return own or alike or _UNKNOWN_ENGINE
        return alike if own.steps.is_like(alike.steps) else own

    def link(self, sender: EngineSnapshot, receiver: EngineSnapshot) -> LinkSpeed:
        """Speed of a pair."""
        return self._links.get((_key(sender), _key(receiver)), _UNKNOWN_LINK)

    def outlook(self, model: bytes, engines: Callable[[], Iterable[EngineSnapshot]]) -> Outlook:
        """What all `engines` of a model, by its digest, will be busy with."""
        looked_s, known = _touch(self._outlooks, model, lambda: (-math.inf, Outlook()), MAX_MODELS)
        at_s = self._clock()
        if at_s - looked_s >= LOOK_S:
            able = [engine for engine in engines() if engine.info.can_transfer]
            kept = [self._flows.get(_key(engine)) for engine in able]
            done = [StepsWork(0.0) if flow is None else flow.per_s(at_s) for flow in kept]
            flows = dict(zip([engine.address for engine in able], done, strict=True))
            link = self.link(able[0], able[-1]) if able else _UNKNOWN_LINK
            fewest = min((engine.info.max_batch_size or math.inf for engine in able), default=math.inf)
            speeds, output = self._alike.get(model, _UNKNOWN_ENGINE), self.mean_output(model)
            known = look(flows, speeds, link, output, fewest, known)
            self._outlooks[model] = at_s, known
        return known

    def expected_output(self, request: PolicyRequest) -> float:
        """Tokens that it will probably generate: as many as others lately, at most what it asked for."""
        mean = self.mean_output(request.model.digest)
        limit = float(request.sampling.max_tokens or mean)
        total = limit if request.sampling.ignore_eos else min(limit, mean)
        return max(1.0, total - request.num_generated)

    def mean_output(self, model: bytes) -> float:
        """Tokens of an answer of a model, by its digest, of late."""
        return self._outputs.get(model, FIRST_GUESS_OUTPUT)

    def reported(self, engine: EngineSnapshot) -> None:
        """An engine has told its load: what it did since it last did is an observation of its steps. With the first
        report it is a newcomer, and what went before is not looked at."""
        before = _touch(self._reports, _key(engine), lambda: engine.load.work, MAX_ENGINES)
        self._reports[_key(engine)] = engine.load.work
        steps = StepsWork.between(before, engine.load.work)
        seconds = engine.load.work.busy_s - before.busy_s
        if steps.steps > 0 and seconds > 0:
            at_s = self._clock()
            _touch(self._flows, _key(engine), lambda: Flow(at_s), MAX_ENGINES).add(steps, at_s)
            for speeds in self._observed(engine):
                speeds.steps.observe(steps.features, seconds)

    def reserved(self, engine: EngineSnapshot, seconds: float) -> None:
        """A prep_recv has ended well."""
        if seconds > 0:
            for speeds in self._observed(engine):
                speeds.reserve.observe((1.0,), seconds)

    def sent(
        self, sender: EngineSnapshot, receiver: EngineSnapshot, tokens: TokenRange, timing: Timing, elapsed_s: float
    ) -> None:
        """A remote_send has ended well; snapshots are of before."""
        seconds = elapsed_s - timing.queue_s - timing.prefill_s
        if seconds > 0:
            moved = min(timing.computed_tokens, len(tokens))
            work = SendWork(cached=len(tokens) - moved, computed=moved)
            key = (_key(sender), _key(receiver))
            _touch(self._links, key, LinkSpeed, MAX_LINKS).observe(work, seconds, timing.transferred_bytes)

    def answered(self, model: bytes, output_tokens: int) -> None:
        """An answer of a model, by its digest, has ended well."""
        mean = _touch(self._outputs, model, lambda: FIRST_GUESS_OUTPUT, MAX_MODELS)
        self._outputs[model] = mean + _OUTPUT_WEIGHT * (output_tokens - mean)

    def _observed(self, engine: EngineSnapshot) -> tuple[EngineSpeeds, EngineSpeeds]:
        """Its own, and those of all engines with its model."""
        alike = _touch(self._alike, engine.info.model.digest, EngineSpeeds, MAX_MODELS)
        return _touch(self._engines, _key(engine), lambda: EngineSpeeds(alike), MAX_ENGINES), alike


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
