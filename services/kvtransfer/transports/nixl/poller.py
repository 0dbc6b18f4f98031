"""The thread that owns every NIXL agent of this process: the library is called from nowhere else."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from services.kvtransfer.transports.nixl.library import Agent, Read, ReadState

T = TypeVar("T")

# UCX completes nothing unless somebody polls. While something is under way: often; else seldom, for what a peer began
# before its push was given up here, and so that agents that nobody uses cost nothing.
_BUSY_S = 0.0001
_IDLE_S = 0.25


class Poller:
    """Runs calls one by one and follows reads until they end. Belongs to the running loop; close it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # The rest belongs to the thread.
        self._moving: dict[Read, asyncio.Future[ReadState]] = {}
        self._agents: dict[Agent, int] = {}
        self._thread = threading.Thread(target=self._work, name="nixl", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Cancelling only stops waiting."""
        future: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            try:
                self._tell(future, work())
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, future, error)

        self._calls.put(run)
        return await future

    def follow(self, post: Callable[[], Read]) -> asyncio.Future[ReadState]:
        """Posts a read; the future tells how it ended, DONE or FAILED, or what `post` raised. Do not cancel it."""
        future: asyncio.Future[ReadState] = self._loop.create_future()

        def run() -> None:
            try:
                read = post()
            except Exception as error:
                self._loop.call_soon_threadsafe(_fail, future, error)
                return
            self._moving[read] = future
            self._poll_read(read)

        self._calls.put(run)
        return future

    def watch(self, agent: Agent, change: int) -> None:
        """So many more users need the agent polled often; it is polled seldom from the first call on."""

        def run() -> None:
            self._agents[agent] = self._agents.get(agent, 0) + change

        self._calls.put(run)

    def forget(self, agent: Agent, memory: object) -> None:
        """Any thread. The agent is destroyed, and only then `memory`, which it had registered, let go."""

        def run() -> None:
            nonlocal memory
            self._agents.pop(agent, None)
            agent.close()
            memory = None

        self._calls.put(run)

    def close(self) -> None:
        """Ends the thread. Reads that are still moving stay as they are."""
        self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=self._pause_s())
            except queue.Empty:
                self._poll()
                continue
            if call is None:
                return
            call()

    def _pause_s(self) -> float:
        return _BUSY_S if self._moving or any(self._agents.values()) else _IDLE_S

    def _poll(self) -> None:
        for agent in self._agents:
            agent.progress()
        for read in tuple(self._moving):
            self._poll_read(read)

    def _poll_read(self, read: Read) -> None:
        state = read.state()
        if state is ReadState.MOVING:
            return
        read.release()
        self._tell(self._moving.pop(read), state)

    def _tell(self, future: asyncio.Future[T], result: T) -> None:
        self._loop.call_soon_threadsafe(_settle, future, result)


def _settle(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
