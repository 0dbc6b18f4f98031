"""One engine address of the fleet, followed for as long as the router runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol, TypeVar

from services.protocol.errors import Code, ServiceError
from services.router.errors import EngineDrained, EngineLost
from services.router.fleet.backoff import Backoff, BackoffConfig
from services.router.fleet.block_index import BlockIndex
from services.router.fleet.breaker import Breaker, BreakerConfig
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, InFlight, Load
from services.router.fleet.port import EnginePort
from services.router.fleet.session import Sequence
from services.router.fleet.underway import Underway
from services.router.text.store import TokenizerStore
from services.router.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Event = TypeVar("Event")
_NOT_CONTACTED, _JOINING = "not contacted yet", "it has restarted"
# A restart takes a few, which are no news; after that somebody should know why.
_TELL_AT_FAILURE = 5


class MemberListener(Protocol):
    """Who wants to know."""

    block_index: BlockIndex

    def changed(self) -> None:
        """A member takes work now, or takes none any more."""

    def loaded(self, member: Member) -> None:
        """A member has told its load."""

    def moved(self, member: Member) -> None:
        """A member's load has changed."""

    def opened(self, member: Member) -> None:
        """A member's breaker has opened."""


class Member:
    """Health, description, load and cached blocks of the engine at one address.

    It joins when it is healthy, described and its tokenizer is at hand, and leaves when the health stream says so or
    breaks. A new incarnation under the same address joins like a new engine.
    """

    def __init__(
        self,
        address: str,
        client: EnginePort,
        tokenizers: TokenizerStore,
        listener: MemberListener,
        backoff: BackoffConfig,
        breaker: BreakerConfig,
    ) -> None:
        self.address = address
        self.client = client
        self.info: EngineInfo | None = None  # the last known, kept while it is away
        self.tokenizer: Tokenizer | None = None
        self.load = Load()
        self.blocks = CachedBlocks(listener.block_index)
        self.breaker = Breaker(address, breaker, on_open=lambda: listener.opened(self))
        self.problem = _NOT_CONTACTED  # empty while it is joined
        self.drained = False  # by an operator
        self.duplicate_of = ""  # the address under which the same engine is in the fleet already
        self._num_failures = 0  # to join, since it left
        self.sequences: set[Sequence] = set()  # of this router, that run there
        self._tokenizers = tokenizers
        self._listener = listener
        self._excess = (0, 0)  # sequences and prompt tokens of others, by the last report
        self.others = InFlight()  # what others than this router have it do
        self._backoff_config = backoff
        self.underway = Underway(self._changed)  # what this router has asked of it
        self._snapshot: EngineSnapshot | None = None
        self._followers: list[asyncio.Task[None]] = []
        self._num_users = 0
        self._gone = False
        self._unused = asyncio.Event()

    @property
    def healthy(self) -> bool:
        """Whether it takes work."""
        return not (self.problem or self.duplicate_of or self.load.draining or self.drained)

    @property
    def is_known(self) -> bool:
        """Whether it has joined, or was found unable to."""
        return self.problem not in (_NOT_CONTACTED, _JOINING)

    def label(self, name: str) -> str:
        """A label given to the engine at start; empty if it has none of that name."""
        return self.info.labels.get(name, "") if self.info is not None else ""

    @property
    def state(self) -> str:
        """Why it takes no work; empty if it does."""
        if self.problem:
            return self.problem
        if self.duplicate_of:
            return f"it is the engine at {self.duplicate_of}"
        if self.load.draining:
            return "it is draining"
        if self.drained:
            return "an operator drains it"
        return "" if self.breaker.admits else "it failed too often and is left alone for a while"

    def drain(self, drained: bool) -> None:
        """An operator's wish: nothing new begins there while it is drained."""
        self.drained = drained
        self._listener.changed()

    def take_sequences_away(self) -> None:
        """Every sequence that runs there goes on elsewhere."""
        for sequence in tuple(self.sequences):
            sequence.take_away(EngineDrained(self.address))

    def begin_use(self) -> None:
        """A request calls it. EngineLost if it was let go: the request chose it before."""
        if self._gone:
            raise EngineLost(f"engine {self.address} has been removed")
        self._num_users += 1

    def end_use(self) -> None:
        """That request is over."""
        self._num_users -= 1
        if not self._num_users:
            self._unused.set()

    async def unused(self) -> None:
        """Waits until no request calls it."""
        while self._num_users:
            self._unused.clear()
            await self._unused.wait()

    def let_go(self) -> None:
        """From now on no request may call it."""
        self._gone = True

    def snapshot(self) -> EngineSnapshot:
        """What is known now. Only for a member that has joined once."""
        if self._snapshot is None:
            assert self.info is not None
            load, underway = self.load, self.underway
            self._snapshot = EngineSnapshot(
                self.address,
                self.info,
                load,
                # A report lags behind our own calls, and our own calls are not all there is.
                max(load.sequences, len(underway.answers)),
                max(load.queued_tokens, underway.prompt_tokens),
                self.blocks,
                underway,
                self.others,
            )
        return self._snapshot

    async def run(self) -> None:
        """Follows the engine until cancelled."""
        backoff = Backoff(self._backoff_config)
        try:
            while True:
                try:
                    async with aclosing(self.client.watch_health()) as changes:
                        async for serving in changes:
                            await (self._join() if serving else self._leave("it is not serving"))
                            backoff.reset()
                    problem = "its health stream ended"
                except ServiceError as error:
                    problem = error.message
                except Exception:
                    # A bug must not leave the engine unwatched for ever.
                    log.exception("following an engine failed", extra={"fields": {"address": self.address}})
                    problem = "internal error of the router"
                await self._leave(problem)
                await backoff.wait()
        finally:
            await self._stop_following()

    def _changed(self) -> None:
        if self._snapshot is not None:  # else nobody has looked since the last change
            self._snapshot = None
            self._listener.moved(self)

    async def _join(self) -> None:
        info = await self.client.get_info()
        if not self.problem and self.info is not None and self.info.incarnation == info.incarnation:
            return
        await self._leave(_JOINING)
        if self.info is None or self.info.incarnation != info.incarnation:
            self.blocks.clear()
            self.breaker.reset()
        self.tokenizer = await self._tokenizers.obtain(info.model.tokenizer_digest, self.client.download_tokenizer)
        self.info, self.load = info, Load()
        self._set_problem("")
        self._followers = [
            asyncio.create_task(self._follow(self.client.watch_load, self._take_load)),
            asyncio.create_task(self._follow(self._open_events, self._take_event)),
        ]
        log.info("engine joined", extra={"fields": {"engine": info.name, "address": self.address}})

    def _open_events(self) -> AsyncGenerator[KvEvent, None]:
        # Half a snapshot of a stream that broke must not mix with the next one.
        self.blocks.resync()
        return self.client.watch_kv_events()

    async def _leave(self, problem: str) -> None:
        fields = {"address": self.address, "problem": problem}
        if not self.problem:
            self._num_failures = 0
            log.warning("engine left", extra={"fields": fields})
        elif problem != _JOINING:
            self._num_failures += 1
            if self._num_failures == _TELL_AT_FAILURE:
                log.warning("engine cannot join", extra={"fields": fields})
        await self._stop_following()
        self._set_problem(problem)

    async def _stop_following(self) -> None:
        followers, self._followers = self._followers, []
        for follower in followers:
            follower.cancel()
        if followers:
            await asyncio.wait(followers)

    def _set_problem(self, problem: str) -> None:
        self.problem, self._snapshot = problem, None
        self._listener.changed()

    async def _follow(
        self, open_stream: Callable[[], AsyncGenerator[Event, None]], take: Callable[[Event], bool]
    ) -> None:
        """Feeds `take` with a stream that is opened again when it breaks or when `take` asks for it."""
        backoff = Backoff(self._backoff_config)
        while True:
            try:
                async with aclosing(open_stream()) as events:
                    async for event in events:
                        if not take(event):
                            break
                        backoff.reset()
            except ServiceError as error:
                if error.code is Code.UNIMPLEMENTED:
                    log.warning("engine lacks a stream", extra={"fields": {"address": self.address}})
                    return
            except Exception:
                log.exception("a stream of an engine failed", extra={"fields": {"address": self.address}})
            await backoff.wait()

    def _take_load(self, load: Load) -> bool:
        drains = load.draining != self.load.draining
        # Of ours that which the engine has been asked for.
        ours, before = (len(self.sequences), self.underway.asked_tokens), self._excess
        self._excess = max(0, load.sequences - ours[0]), max(0, load.queued_tokens - ours[1])
        # The less of two reports: one alone lags behind calls of ours that have just begun or ended.
        self.others = InFlight(min(before[0], self._excess[0]), min(before[1], self._excess[1]))
        self.load = load
        self._changed()
        if drains:
            self._listener.changed()
        self._listener.loaded(self)
        return True

    def _take_event(self, event: KvEvent) -> bool:
        return self.blocks.apply(event)
