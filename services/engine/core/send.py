"""One RemoteSend, from its arrival until the last of its source pages is read no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from services.engine.core.account import Account
from services.engine.core.api import RemoteSend, Reply
from services.engine.core.sequence import Sequence
from services.engine.core.timers import Timer
from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing


@dataclass(slots=True)
class Pushes:
    """The pieces of an attempt that were posted to the transfer service."""

    live: dict[int, int | None] = field(default_factory=dict)  # push id -> its ready slot
    end: int = 0  # positions before this one are posted
    is_committed: bool = False


class Send:
    """A live RemoteSend. Changed by Sends only.

    It holds its pages until its last push has ended, whatever became of it before: a push reads them.
    """

    def __init__(self, command: RemoteSend, sequence: Sequence, on_abort: Callable[[Send], None]) -> None:
        """`on_abort` stops the send that it is given."""
        self._on_abort = on_abort
        self.command = command
        self.sequence = sequence
        self.replies: list[Reply[Timing]] = [command.reply]  # not answered yet
        self.num_callers = 1
        self.pushes = Pushes(end=command.range.begin)
        self.result: Timing | ServiceError | None = None
        self.timer: Timer | None = None

    @property
    def account(self) -> Account:
        """Its account."""
        return self.sequence.account

    @property
    def range(self) -> TokenRange:
        """What is to be moved."""
        return self.command.range

    def unposted(self, end: int) -> TokenRange:
        """The part before position `end` that is to be moved and was not posted yet."""
        return TokenRange(self.pushes.end, max(self.pushes.end, min(end, self.range.end)))

    def cancel(self) -> None:
        """One of the callers is gone; when all are, the send stops."""
        self.num_callers -= 1
        if self.num_callers <= 0:
            self._on_abort(self)

    def abort(self) -> None:
        """Stops the send."""
        self._on_abort(self)
