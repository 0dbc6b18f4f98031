"""Moves contexts between engines by the verbs, within budgets, whatever planner wants it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from services.protocol.errors import ServiceError
from services.protocol.timing import Timing
from services.router.clock import now
from services.router.cost.book import CostBook
from services.router.fleet.registry import Registry
from services.router.fleet.scope import RequestScope
from services.router.fleet.view import Engine
from services.router.metrics import PLANNER_MOVED_BYTES, PLANNER_MOVED_TOKENS, PLANNER_MOVES
from services.router.planning.view import Move, Site

log = logging.getLogger(__name__)

RETRY_S = 60.0  # what was tried is not to be tried again before
_KEPT = 256  # moves to look back on
_AT_A_LOOK = 64
Link = tuple[str, str]  # addresses of sender and receiver


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """A move that was tried. `code` is OK or the reason of the failure; CANCELLED: time was over, or the planner."""

    at_s: float
    topic: str
    source: str  # names of engines
    target: str
    tokens: int  # that the target was to have
    why: str
    code: str
    moved_tokens: int
    moved_bytes: int
    elapsed_s: float
    address: str  # of the target


class Mover:
    """Keeps account of the links from one look to the next."""

    def __init__(self, registry: Registry, costs: CostBook, *, moves: int, bytes_per_s: float) -> None:
        """At most `moves` at once, and on a link `bytes_per_s` on average: who has had more waits."""
        self.records: deque[MoveRecord] = deque(maxlen=_KEPT)
        self.outcomes: Counter[str] = Counter()
        self._registry = registry
        self._costs = costs
        self._turns = asyncio.Semaphore(moves)
        self._bytes_per_s = bytes_per_s
        self._free_at: dict[Link, float] = {}

    def tried(self) -> frozenset[tuple[str, str]]:
        """(topic's name, target's address) of what was tried within RETRY_S."""
        since = now() - RETRY_S
        return frozenset((record.topic, record.address) for record in self.records if record.at_s >= since)

    def engine(self, site: Site, scope: RequestScope) -> Engine:
        """The engine as policies see it, to call verbs on. NoEngine if it has been removed."""
        member = self._registry.member(site.address)
        return Engine(member.snapshot(), member, scope, self._costs)

    async def carry_out(self, moves: Iterable[Move], scope: RequestScope, limit_s: float) -> None:
        """Returns when all have ended, or have been ended because `limit_s` seconds are over. Those whose link has had
        its share already are left out; a planner that still wants them will say so again."""
        links: defaultdict[Link, list[Move]] = defaultdict(list)
        for move in list(moves)[:_AT_A_LOOK]:
            links[move.source.address, move.target.address].append(move)
        # Of engines that have gone nobody asks any more.
        self._free_at = {link: free_at for link, free_at in self._free_at.items() if free_at > now()}
        deadline = now() + limit_s
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline), asyncio.TaskGroup() as group:
                for link, wanted in links.items():
                    group.create_task(self._one_by_one(link, wanted, scope, deadline), name="move contexts")

    async def _one_by_one(self, link: Link, moves: Sequence[Move], scope: RequestScope, deadline: float) -> None:
        for move in moves:
            async with self._turns:
                if now() < self._free_at.get(link, 0.0):
                    return
                timing = await self._move(move, scope, deadline)
                self._free_at[link] = now() + timing.transferred_bytes / self._bytes_per_s

    async def _move(self, move: Move, scope: RequestScope, deadline: float) -> Timing:
        begin, code, timing = now(), "CANCELLED", Timing()
        try:
            source, target = self.engine(move.source, scope), self.engine(move.target, scope)
            limit = min(source.info.max_context, target.info.max_context)
            context = replace(move.topic.context, prompt=_prompt(move, limit), deadline=deadline)
            async with target.prep_recv(context, end=move.tokens) as kv:
                timing = await source.remote_send(context, kv)
                await kv.release(publish=True)
            code = "OK"
        except ServiceError as error:
            code = error.reason
        finally:
            self._record(move, begin, code, timing)
        return timing

    def _record(self, move: Move, begin: float, code: str, timing: Timing) -> None:
        record = MoveRecord(
            at_s=begin,
            topic=move.topic.name,
            source=move.source.name,
            target=move.target.name,
            tokens=move.tokens,
            why=move.why,
            code=code,
            moved_tokens=timing.transferred_tokens,
            moved_bytes=timing.transferred_bytes,
            elapsed_s=now() - begin,
            address=move.target.address,
        )
        self.records.append(record)
        self.outcomes[code] += 1
        PLANNER_MOVES.labels(code).inc()
        PLANNER_MOVED_TOKENS.inc(timing.transferred_tokens)
        PLANNER_MOVED_BYTES.inc(timing.transferred_bytes)
        names = ("topic", "source", "target", "tokens", "why", "code")
        log.info("a context was to move", extra={"fields": {name: getattr(record, name) for name in names}})


def _prompt(move: Move, limit: int) -> tuple[int, ...]:
    """The context, with a token behind what is moved of it: engines compute the last token of a prompt in another way
    than those before it, and what is moved serves prompts that go on. Any token will do, for it is not computed.

    Behind a context as long as engines take, which no prompt goes on from, there is none.
    """
    prompt = move.topic.context.prompt
    return (*prompt, prompt[-1]) if move.tokens == len(prompt) < limit else prompt
