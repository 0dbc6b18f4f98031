"""What goes on out of one pool: its live pushes, and the attempts that its engine opened and gave up."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from services.kvtransfer.errors import TransportFailed
from services.kvtransfer.landing import Claim
from services.kvtransfer.push import Push, PushObserver, PushState
from services.protocol.address import KvAddress
from services.protocol.errors import AttemptSuperseded, ReservationGone

# An attempt as its sender knows it: at which reservation, and as whose.
SentAttempt = tuple[KvAddress, Claim]


def attempt_of(push: Push) -> SentAttempt:
    """The attempt that a push is a part of."""
    return push.request.address, push.request.claim


class EndedAttempts:
    """The newest attempts that were given up. A call lives seconds; this is far more attempts than end meanwhile."""

    _MOST = 4_096

    def __init__(self) -> None:
        self._attempts: OrderedDict[SentAttempt, None] = OrderedDict()

    def add(self, attempt: SentAttempt) -> None:
        """Remembers one; the oldest is forgotten for it."""
        self._attempts[attempt] = None
        if len(self._attempts) > self._MOST:
            self._attempts.popitem(last=False)

    def __contains__(self, attempt: SentAttempt) -> bool:
        return attempt in self._attempts


class Outbox:
    """A PushObserver that keeps the pushes out of one pool, and hands what it is told on to `books`."""

    def __init__(self, books: PushObserver) -> None:
        self.pushes: set[Push] = set()
        # Opened by this pool's engine, and neither committed nor ended yet.
        self.open_attempts: set[SentAttempt] = set()
        # Given up by this pool's engine: a push of one that comes late is refused.
        self.ended_attempts = EndedAttempts()
        # Ends what the engine left behind; None before it goes.
        self.cleanup: asyncio.Task[None] | None = None
        self._books = books

    def failed_to_open(self, push: Push, error: TransportFailed) -> None:
        """See PushObserver."""
        self._books.failed_to_open(push, error)

    def opened(self, push: Push) -> None:
        """See PushObserver."""
        self.open_attempts.add(attempt_of(push))
        self._books.opened(push)

    def moved(self, push: Push, num_bytes: int) -> None:
        """See PushObserver."""
        self._books.moved(push, num_bytes)

    def ended(self, push: Push, failure: BaseException | None) -> None:
        """See PushObserver."""
        self.pushes.discard(push)
        is_committed = push.progress is not None and push.progress.state is PushState.COMMITTED
        if is_committed or isinstance(failure, (ReservationGone, AttemptSuperseded)):
            self.open_attempts.discard(attempt_of(push))
        self._books.ended(push, failure)
