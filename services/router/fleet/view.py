"""What a policy sees of the fleet: engines to choose from and the three verbs to call on them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from services.protocol.errors import Code, ServiceError
from services.protocol.ranges import TokenRange
from services.router.fleet import choose
from services.router.fleet.info import EngineInfo, EngineSnapshot
from services.router.fleet.member import Member
from services.router.fleet.recovery import Remedy, remedy
from services.router.fleet.reservation import CALL_TIMEOUT_S, Reservation
from services.router.fleet.scope import RequestScope
from services.router.request import PolicyRequest
from services.router.values import Chunk, Timing, Verb

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

    def __init__(self, snapshot: EngineSnapshot, member: Member, scope: RequestScope) -> None:
        self.snapshot = snapshot
        self._member = member
        self._scope = scope

    @property
    def info(self) -> EngineInfo:
        """Name, labels, sizes."""
        return self.snapshot.info

    def cached_prefix(self, request: PolicyRequest) -> int:
        """Tokens of the prompt that are probably cached there."""
        return self.snapshot.cached_prefix(request)

    def page_floor(self, position: float) -> int:
        """The last page boundary at or before a token position."""
        return int(position) // self.info.page_size * self.info.page_size

    @asynccontextmanager
    async def prep_recv(
        self, request: PolicyRequest, *, end: int, max_wait_s: float = 0.0
    ) -> AsyncIterator[Reservation]:
        """Reserves room for KV of prompt[:end] for the block, and releases what was not used up when it ends,
        however it ends. An engine short of pages is waited for at most `max_wait_s`."""
        reservation = await self._reserve(request, end, max_wait_s)
        await self._scope.hold(reservation)
        try:
            yield reservation
        finally:
            await self._scope.let_go(reservation)

    async def remote_send(self, request: PolicyRequest, kv: Reservation, tokens: TokenRange | None = None) -> Timing:
        """Computes KV of `tokens` (by default all that is missing) or takes it from the cache, and writes it into
        `kv`. Returns when every byte is in place; at once, with no call, if the range is empty."""
        tokens = kv.missing if tokens is None else tokens
        if not tokens:
            return Timing()
        with (
            self._scope.legs.begin(Verb.REMOTE_SEND, self.info.name, tokens) as leg,
            self._watched(),
            self._member.sending(len(tokens)),
        ):
            call_id, attempt = self._scope.next_call_id(), kv.next_attempt(tokens)
            timing = await self._member.client.remote_send(call_id, request, tokens, kv.kv, attempt)
            leg.end(timing)
            return timing

    def start_generate(
        self, request: PolicyRequest, *, begin: int = 0, kv: Reservation | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """Tokens that follow the prompt; prompt[:begin] comes from `kv`. Leaving the loop cancels the sequence."""
        return self._scope.stream(self._generate(request, begin, kv))

    async def _generate(
        self, request: PolicyRequest, begin: int, kv: Reservation | None
    ) -> AsyncGenerator[Chunk, None]:
        scope, tokens = self._scope, TokenRange(begin, len(request.prompt))
        with (
            scope.legs.begin(Verb.START_GENERATE, self.info.name, tokens) as leg,
            self._watched() as succeeded,
            self._member.generating(len(tokens)) as prompt_computed,
        ):
            call_id = scope.next_call_id()
            sequence = self._member.client.start_generate(call_id, request, begin, kv.kv if kv is not None else None)
            scope.opened(sequence)
            try:
                while (chunk := await sequence.take()) is not None:
                    if chunk.token_ids:
                        leg.first_token()
                        prompt_computed()
                        succeeded()
                        if kv is not None:
                            kv.in_use()
                    if chunk.finish is not None:
                        # Before the chunk is handed on: whoever gets it may ask for the account at once.
                        leg.end(chunk.timing)
                        if kv is not None:
                            kv.used_up()
                    yield chunk
            finally:
                scope.ended(sequence)

    @contextmanager
    def _watched(self) -> Iterator[Callable[[], None]]:
        """Around every verb: an engine that fails is not chosen again for this request. What is yielded tells of a
        success that comes before the verb's end."""
        self._scope.use(self._member)
        try:
            with self._member.breaker.call() as succeeded:
                yield succeeded
        except ServiceError as error:
            if remedy(error) is Remedy.ELSEWHERE:
                self._scope.avoided.add(self.snapshot.address)
            raise

    async def _reserve(self, request: PolicyRequest, end: int, max_wait_s: float) -> Reservation:
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
        return Reservation(self.info.name, kv, client, scope.cleanup)


class Fleet:
    """The engines that serve a request's model. Every look sees them as they are at that moment."""

    def __init__(
        self,
        scope: RequestScope,
        members: Callable[[str], Member],
        engines: Callable[[], list[EngineSnapshot]],
    ) -> None:
        self._scope = scope
        self._members = members
        self._engines = engines

    @property
    def engines(self) -> tuple[Engine, ...]:
        """All that take work now and have not failed this request, by address. May be empty."""
        return tuple(map(self.engine, self._candidates()))

    def engine(self, snapshot: EngineSnapshot) -> Engine:
        """The engine that a snapshot describes, to call it."""
        return Engine(snapshot, self._members(snapshot.address), self._scope)

    def least_loaded(self, request: PolicyRequest) -> Engine:
        """The engine with the fewest sequences for its size. NoEngine."""
        return self.engine(choose.least_loaded(self._candidates()))

    def pair(self, request: PolicyRequest) -> tuple[Engine, Engine]:
        """(prefill, decode), two different engines, the least loaded of each role. NoPair."""
        prefill, decode = choose.pair(self._candidates())
        return self.engine(prefill), self.engine(decode)

    def pair_by_prefix(self, request: PolicyRequest) -> tuple[Engine, Engine]:
        """(prefill, decode), of each role the engine that has most of the prompt cached. NoPair."""
        prefill, decode = choose.pair_by_prefix(request, self._candidates())
        return self.engine(prefill), self.engine(decode)

    def _candidates(self) -> list[EngineSnapshot]:
        return [engine for engine in self._engines() if engine.address not in self._scope.avoided]
