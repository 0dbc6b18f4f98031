"""What a policy sees of the fleet: engines to choose from and the three verbs to call on them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from services.protocol.errors import Code, ServiceError
from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.clock import now
from services.router.cost.book import CostBook
from services.router.cost.decision import Decision
from services.router.cost.placement import SHORTLIST, Planner
from services.router.cost.speeds import EngineSpeeds, LinkSpeed
from services.router.fleet.choose import least_loaded
from services.router.fleet.generation import Generation
from services.router.fleet.homes import Homes
from services.router.fleet.info import EngineInfo, EngineSnapshot
from services.router.fleet.member import Member
from services.router.fleet.reservation import CALL_TIMEOUT_S, Reservation
from services.router.fleet.roster import Roster
from services.router.fleet.scope import RequestScope
from services.router.fleet.underway import Answer, Answering, Computing
from services.router.fleet.watched import Watched
from services.router.request import PolicyRequest
from services.router.values import Verb

SHORTEST_HOLD_S = 5e-3
# After these an engine has certainly not made a reservation.
_REFUSALS = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.FAILED_PRECONDITION,
        Code.RESOURCE_EXHAUSTED,
        Code.PERMISSION_DENIED,
        Code.UNIMPLEMENTED,
        Code.UNAUTHENTICATED,
    }
)


class Engine:
    """An engine as chosen for one request: what was known of it then, and its verbs."""

    def __init__(self, snapshot: EngineSnapshot, member: Member, scope: RequestScope, costs: CostBook) -> None:
        self.snapshot = snapshot
        self._member = member
        self._scope = scope
        self._costs = costs

    @property
    def info(self) -> EngineInfo:
        """Name, labels, sizes."""
        return self.snapshot.info

    @property
    def speeds(self) -> EngineSpeeds:
        """How fast it computes, as measured."""
        return self._costs.engine(self.snapshot)

    def link(self, receiver: Engine) -> LinkSpeed:
        """How fast it sends KV to another engine, as measured."""
        return self._costs.link(self.snapshot, receiver.snapshot)

    def cached_prefix(self, request: PolicyRequest) -> int:
        """Tokens of the prompt that are probably cached there, and of use to this request."""
        return min(self.snapshot.cached_prefix(request), request.num_movable)

    def page_floor(self, position: float) -> int:
        """The last page boundary at or before a token position."""
        return int(position) // self.info.page_size * self.info.page_size

    @asynccontextmanager
    async def prep_recv(
        self, request: PolicyRequest, *, end: int, max_wait_s: float = 0.0
    ) -> AsyncIterator[Reservation]:
        """Reserves room for KV of prompt[:end] for the block, and releases what was not used up when it ends,
        however it ends. An engine short of pages is waited for at most `max_wait_s`.

        What is to be rated of the prompt is computed where it is generated from: `end` comes before it, and so do the
        range of remote_send and the `begin` of start_generate, whatever a program says.
        """
        end = min(end, request.num_movable)
        answer = Answer(self._costs.expected_output(request))
        with Answering(self._member.underway, answer):
            reservation = await self._reserve(request, end, max_wait_s, answer)
            await self._scope.hold(reservation)
            try:
                yield reservation
            finally:
                await self._scope.let_go(reservation)

    def remote_send(
        self, request: PolicyRequest, kv: Reservation, tokens: TokenRange | None = None
    ) -> Coroutine[Any, Any, Timing]:
        """Computes KV of `tokens` (by default all that is missing) or takes it from the cache, and writes it into
        `kv`. Returns when every byte is in place; at once, with no call, if the range is empty."""
        tokens = kv.missing if tokens is None else _movable(tokens, request)
        return self._remote_send(request, kv, tokens, self._scope.sends(kv, tokens))

    async def _remote_send(
        self, request: PolicyRequest, kv: Reservation, tokens: TokenRange, begin: Callable[[], None]
    ) -> Timing:
        begin()
        self._scope.redeem()
        if not tokens:
            return Timing()
        kv.check()
        with (
            self._scope.legs.begin(Verb.REMOTE_SEND, self.info.name, tokens) as leg,
            self._watched(),
            Computing(self._member.underway, len(tokens)),
        ):
            call_id, attempt = self._scope.next_call_id(), kv.next_attempt(tokens)
            timing = await self._member.client.remote_send(call_id, request, tokens, kv.kv, attempt)
            leg.end(timing)
            self._costs.sent(self.snapshot, kv.receiver, tokens, timing, leg.leg().elapsed_s)
            return timing

    def start_generate(self, request: PolicyRequest, *, begin: int = 0, kv: Reservation | None = None) -> Generation:
        """Tokens that follow the prompt; prompt[:begin] comes from `kv`. Yield it whole, or read it; aclose() what is
        not read to its end, or it goes on until the request ends."""
        generation = Generation(request, begin, kv, self.snapshot, self._member, self._scope, self._costs)
        self._scope.stream(generation)
        return generation

    def _watched(self) -> Watched:
        return Watched(self._member, self._scope)

    async def _reserve(self, request: PolicyRequest, end: int, max_wait_s: float, answer: Answer) -> Reservation:
        scope, client, call_id = self._scope, self._member.client, self._scope.next_call_id()
        with scope.legs.begin(Verb.PREP_RECV, self.info.name, TokenRange(0, end)) as leg, self._watched():
            try:
                kv = await client.prep_recv(call_id, request, end, max_wait_s)
            except BaseException as error:
                if not (isinstance(error, ServiceError) and error.code in _REFUSALS):
                    # Cut off, by us or by the network, perhaps after the engine had reserved.
                    scope.cleanup.spawn("abort", client.abort(call_id, timeout_s=CALL_TIMEOUT_S))
                raise
            leg.end(kv.timing)
        self._costs.reserved(self.snapshot, leg.leg().elapsed_s)
        return Reservation(self.snapshot, kv, answer, client, scope.cleanup)


def _movable(tokens: TokenRange, request: PolicyRequest) -> TokenRange:
    """What of a range may come from another engine."""
    limit = request.num_movable
    return tokens if tokens.end <= limit else TokenRange(min(tokens.begin, limit), limit)


class Fleet:
    """The engines that serve a request's model. Every look sees them as they are at that moment."""

    def __init__(
        self,
        scope: RequestScope,
        members: Callable[[str], Member],
        engines: Callable[[], list[EngineSnapshot]],
        roster: Callable[[], Roster[Member]],
        costs: CostBook,
        homes: Homes,
    ) -> None:
        self._costs = costs
        self._homes = homes
        self._scope = scope
        self._members = members
        self._engines = engines
        self._roster = roster

    @property
    def engines(self) -> tuple[Engine, ...]:
        """All that take work now and have not failed this request, by name and address. May be empty."""
        return tuple(map(self.engine, self._candidates()))

    def engine(self, snapshot: EngineSnapshot) -> Engine:
        """The engine that a snapshot describes, to call it."""
        return Engine(snapshot, self._members(snapshot.address), self._scope, self._costs)

    def _chosen(self, member: Member) -> Engine:
        return Engine(member.snapshot(), member, self._scope, self._costs)

    def _to_prefill(self, member: Member, num_tokens: int) -> Engine:
        """It will be asked for so many tokens of the prompt once there is room for them elsewhere. Until then others
        are to know."""
        chosen = self._chosen(member)
        self._scope.pledge(member.underway, num_tokens)
        return chosen

    def leaving(self, address: str) -> Engine:
        """The engine at an address, also one that takes no new work: to fetch KV from. UnknownEngine."""
        return self.engine(self._members(address).snapshot())

    def least_loaded(self, request: PolicyRequest) -> Engine:
        """The engine with the fewest sequences for its size. NoEngine."""
        return self._chosen(self._roster().least_loaded(self._scope.avoided))

    def pair(self, request: PolicyRequest) -> tuple[Engine, Engine]:
        """(prefill, decode), two different engines, the least loaded of each role. NoPair."""
        self._scope.redeem()  # what it chose before is nobody's load
        prefill, decode = self._roster().pair(self._scope.avoided)
        return self._to_prefill(prefill, request.num_movable), self._chosen(decode)

    def pair_by_prefix(self, request: PolicyRequest) -> tuple[Engine, Engine]:
        """(prefill, decode), of each role the engine that has most of the prompt cached. NoPair."""
        self._scope.redeem()
        prefill, decode = self._roster().pair_by_prefix(request, self._scope.avoided)
        return self._to_prefill(prefill, request.num_movable), self._chosen(decode)

    def home(self, request: PolicyRequest) -> Engine | None:
        """Of the engines where a planner wants the request's topic to be at home the least loaded; None: there is no
        planner, the request is of no topic, or none of them can be chosen."""
        addresses = self._homes.of(request)
        at_home = [engine for engine in self._candidates() if engine.address in addresses] if addresses else []
        return self.engine(least_loaded(at_home)) if at_home else None

    async def cheapest(self, request: PolicyRequest) -> tuple[Engine | None, Engine, int]:
        """(prefill, decode, split) of the cheapest placement: `prefill` provides KV of prompt[:split]; None: `decode`
        does it all. Returns when it is time to begin: a prompt may be worth keeping back while sequences end that it
        would hold up. Why, is kept with the request's trace. NoEngine."""
        self._scope.redeem()
        begin = now()
        while True:
            roster = self._roster()
            outlook = self._costs.outlook(request.model.digest, roster.snapshots)
            shortlist = roster.shortlist(request, SHORTLIST, self._scope.avoided, outlook.prefill_pool)
            snapshots, held_s = [member.snapshot() for member in shortlist], now() - begin
            placements = Planner(self._costs, request, snapshots, outlook, held_s).placements()
            self._scope.legs.decision = Decision.of(placements)
            best = placements[0]
            if best.hold_s <= held_s:
                decode = self.engine(best.decode)
                if best.prefill is None:
                    return None, decode, best.split
                return self._to_prefill(self._members(best.prefill.address), best.split), decode, best.split
            # Much may change until then: half of it, and another look.
            await asyncio.sleep(max(SHORTEST_HOLD_S, (best.hold_s - held_s) / 2))

    def _candidates(self) -> list[EngineSnapshot]:
        return [engine for engine in self._engines() if engine.address not in self._scope.avoided]
