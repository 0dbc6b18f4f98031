"""The other ranks of a replica as rank 0 has them: started, told what to do, and watched."""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

from services.engine.config import EngineConfig
from services.engine.parallel.messages import Compute, CopyPages, Done, Failed, Poison, PoolShape, RankTask
from services.rpc.errors import StartError

log = logging.getLogger(__name__)

END_PATIENCE_S = 5.0


class RankLost(Exception):
    """A rank of the replica has ended; without it nothing can be computed."""


class Ranks:
    """Ranks 1 to count - 1, each a process with a socket pair to this one. They end when this process does, however."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts them; they load what they need at once."""
        # No path that would be left behind, however this process ends; it stays open, as TorchCollective wants it.
        self.meeting_place = os.memfd_create("microserve-ranks")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._closing = threading.Event()
        for rank in range(1, config.tp):
            ours, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-m", "services.engine.parallel.worker", str(theirs.fileno())]
            with theirs:
                passed = (theirs.fileno(), self.meeting_place)
                self._processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=passed))
            self._connections.append(Connection(ours.detach()))
            self._connections[-1].send(RankTask(config, rank, self.meeting_place))

    def wait_loaded(self) -> None:
        """Returns when all have their weights. Raises StartError with the reason of one that could not."""
        self._hear_all()

    def attach(self, shape: tuple[int, ...], descriptor: int | None) -> None:
        """Gives them their part of a pool: of the memory behind `descriptor`, or else memory of their own.

        Raises StartError.
        """
        for connection, process in zip(self._connections, self._processes, strict=True):
            connection.send(PoolShape(shape, shared=descriptor is not None))
            if descriptor is not None:
                send_handle(connection, descriptor, process.pid)
        self._hear_all()

    def watch(self, on_lost: Callable[[RankLost], None]) -> None:
        """Calls `on_lost` once, on a thread of its own, when one of them ends before close()."""
        threading.Thread(target=self._watch, args=(on_lost,), name="rank-watch", daemon=True).start()

    def tell(self, message: Compute) -> None:
        """Begins a step on all of them. Raises RankLost."""
        try:
            for connection in self._connections:
                connection.send(message)
        except OSError as error:
            raise RankLost("a rank of this replica is gone") from error

    def ask(self, message: CopyPages | Poison) -> None:
        """Returns when all have done it. Raises RankLost."""
        try:
            for connection in self._connections:
                connection.send(message)
            for connection in self._connections:
                connection.recv()
        except (OSError, EOFError) as error:
            raise RankLost("a rank of this replica is gone") from error

    def close(self) -> None:
        """Ends them. Again is no error."""
        self._closing.set()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            try:
                process.wait(END_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _hear_all(self) -> None:
        for rank, connection in enumerate(self._connections, 1):
            try:
                answer: Done | Failed = connection.recv()
            except (OSError, EOFError):
                raise StartError(f"rank {rank} ended before it was ready; its log is above") from None
            if isinstance(answer, Failed):
                raise StartError(f"rank {rank}: {answer.why}")

    def _watch(self, on_lost: Callable[[RankLost], None]) -> None:
        # Nobody reaps them before close(), so each still has its process id, also if it has ended.
        ranks = {os.pidfd_open(process.pid): rank for rank, process in enumerate(self._processes, 1)}
        ends = select.poll()
        for descriptor in ranks:
            ends.register(descriptor, select.POLLIN)
        lost = ranks[ends.poll()[0][0]]
        for descriptor in ranks:
            os.close(descriptor)
        if not self._closing.is_set():
            log.critical("a rank has ended, so the replica does", extra={"fields": {"rank": lost}})
            on_lost(RankLost(f"rank {lost} of this replica has ended"))
