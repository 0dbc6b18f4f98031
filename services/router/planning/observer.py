"""From the registry, the cost book and the traffic to what a planner sees."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence

from services.router.clock import now
from services.router.cost.book import CostBook
from services.router.cost.speeds import PrefillWork, SendWork
from services.router.fleet.homes import GRAIN, Homes
from services.router.fleet.info import EngineSnapshot
from services.router.fleet.registry import Registry
from services.router.planning.topics import Topic, TopicLimits, find_topics
from services.router.planning.traffic import Traffic
from services.router.planning.view import Site, View
from services.router.request import ModelKey

_BUSY_LOOKS = 5  # how far back an engine's share of time goes


class BookCosts:
    """Costs from the cost book."""

    def __init__(self, book: CostBook, engines: Mapping[str, EngineSnapshot]) -> None:
        self._book = book
        self._engines = engines

    def prefill_s(self, site: Site, tokens: int, after: int) -> float:
        """See Costs."""
        return self._book.engine(self._engines[site.address]).prefill_s(PrefillWork(tokens, after))

    def send_s(self, source: Site, target: Site, tokens: int) -> float:
        """See Costs."""
        sender, receiver = self._engines[source.address], self._engines[target.address]
        link = self._book.link(sender, receiver)
        return self._book.engine(receiver).reserve_s + link.send_s(SendWork(cached=tokens, computed=0))


class Observer:
    """Looks again and again; what it remembers from look to look is how busy engines were."""

    def __init__(
        self, registry: Registry, traffic: Traffic, costs: CostBook, homes: Homes, limits: TopicLimits
    ) -> None:
        self.views: tuple[View, ...] = ()  # of the last look
        self._registry = registry
        self._traffic = traffic
        self._costs = costs
        self._homes = homes
        self._limits = limits
        self._busy: dict[tuple[str, bytes], deque[tuple[float, float]]] = {}  # (when, busy seconds) of an incarnation

    async def look(self, tried: frozenset[tuple[str, str]], limit_s: float) -> tuple[View, ...]:
        """A view for every model that is served, to be acted upon within `limit_s`. The event loop gets its turn
        between the parts of the work."""
        samples, span_s = self._traffic.samples(), self._traffic.span_s()
        for sample in samples:
            if not sample.request.is_hashed(GRAIN):
                sample.request.block_hashes(GRAIN)
                await asyncio.sleep(0)
        views = []
        for model in self._registry.models():
            own = [sample for sample in samples if sample.request.model == model.key]
            topics = find_topics(own, span_s, self._limits, now() + limit_s)
            await asyncio.sleep(0)
            rate = sum(sample.weight for sample in own) / span_s
            views.append(await self._view(model.key, topics, rate, tried))
        self._forget()
        self.views = tuple(views)
        return self.views

    async def _view(
        self, model: ModelKey, topics: Sequence[Topic], rate: float, tried: frozenset[tuple[str, str]]
    ) -> View:
        engines = self._registry.engines(model)
        sites = []
        for engine in engines:
            sites.append(self._site(engine, topics))
            await asyncio.sleep(0)
        homes = {topic.name: self._homes.of(topic.context) for topic in topics}
        costs = BookCosts(self._costs, {engine.address: engine for engine in engines})
        return View(model, tuple(topics), rate, tuple(sites), homes, tried, costs)

    def _site(self, engine: EngineSnapshot, topics: Sequence[Topic]) -> Site:
        info = engine.info
        return Site(
            name=info.name,
            address=engine.address,
            busy=self._busy_share(engine),
            page_size=info.page_size,
            usable_pages=engine.load.usable_pages,
            longest_pages=-(-info.max_context // info.page_size),
            can_transfer=info.can_transfer,
            cached={topic.name: engine.cached_prefix(topic.context) for topic in topics},
        )

    def _busy_share(self, engine: EngineSnapshot) -> float:
        seen = self._busy.setdefault((engine.address, engine.info.incarnation), deque(maxlen=_BUSY_LOOKS + 1))
        seen.append((now(), engine.load.work.busy_s))
        (begin_s, before), (end_s, after) = seen[0], seen[-1]
        return min(1.0, max(0.0, (after - before) / (end_s - begin_s))) if end_s > begin_s else 0.0

    def _forget(self) -> None:
        """Engines that are gone."""
        moment = now()
        self._busy = {key: seen for key, seen in self._busy.items() if seen[-1][0] >= moment - 60}
