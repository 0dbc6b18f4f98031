"""What the parts of the core share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from services.engine.core.api import RequestKey, SequenceOutput, writer_id
from services.engine.core.blocks import BlockChain
from services.engine.core.calls import Calls
from services.engine.core.config import CoreConfig
from services.engine.core.faults import FaultPoints
from services.engine.core.guides import GuidePort
from services.engine.core.pace import Pace
from services.engine.core.plan import Runner
from services.engine.core.pool import PagePool
from services.engine.core.prefix_waits import PrefixWaits
from services.engine.core.scheduler import Scheduler
from services.engine.core.timers import Timers
from services.engine.core.transfer import TransferLink
from services.engine.errors import EngineDraining, QueueFull
from services.protocol.hashes import hash_seed


@dataclass(slots=True)
class Context:
    """Shared state of the core, all of it owned by the loop thread."""

    config: CoreConfig
    clock: Callable[[], float]  # seconds, monotonic
    runner: Runner
    pool: PagePool
    waits: PrefixWaits
    scheduler: Scheduler
    timers: Timers
    link: TransferLink
    calls: Calls
    outputs: list[SequenceOutput]  # of this step, until they are handed over
    faults: FaultPoints
    pace: Pace
    guides: GuidePort | None  # None: no output can be guided
    arrivals: count[int]
    draining: bool = False

    def chain(self, tokens: tuple[int, ...], cache_salt: str) -> BlockChain:
        """The tokens as blocks of the prefix cache."""
        return BlockChain(list(tokens), self.config.page_size, hash_seed(self.config.model_digest, cache_salt))

    def check_not_draining(self) -> None:
        """Raises EngineDraining if no new work is taken."""
        if self.draining:
            raise EngineDraining("The engine is shutting down.")

    def check_queue(self) -> None:
        """Raises QueueFull if nothing more may wait."""
        if self.scheduler.num_queued >= self.config.max_waiting:
            raise QueueFull(f"{self.config.max_waiting} requests wait already.", retry_delay_s=self.retry_delay_s())

    def retry_delay_s(self) -> float:
        """How long until it is worth asking again: the time that the work in hand takes, within bounds."""
        return self.pace.seconds_for(sum(sequence.num_left for sequence in self.scheduler))

    def writer_id(self, key: RequestKey) -> str:
        """Name of a sender's attempts: this engine's incarnation and the request."""
        return writer_id(self.config.incarnation, key)
