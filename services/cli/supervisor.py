"""Who of a fleet has died, who is started again, and when all are ready again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.client import wait_serving
from services.cli.errors import CliError
from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess
from services.cli.restarts import Restarts, start_limit_s

# A service that is ready and does not serve for so long is told of.
_SLOW_S = 30.0
_PAUSE_S = 1.0


class Supervisor:
    """Hears of deaths. Once `restarting` is set, it starts what died again where it was, so that the others find it.

    `failed` is done, with the reason, when a death is to end everything. `on_death` hears of each that is started
    again, `on_ready` once all are ready and serve again, however late that is, and `on_slow` of each that is ready and
    does not serve meanwhile. Nothing here blocks the loop.
    """

    def __init__(
        self,
        fleet: Fleet,
        on_death: Callable[[ServiceProcess], None],
        on_ready: Callable[[], None],
        on_slow: Callable[[ServiceProcess], None],
        longest_start_s: float,
    ) -> None:
        """A service that is started again and is not ready in the time that its first start allows it, at most
        `longest_start_s`, is killed, which counts as its death."""
        self.restarting = False
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._fleet = fleet
        self._on_death = on_death
        self._on_ready = on_ready
        self._on_slow = on_slow
        self._longest_start_s = longest_start_s
        self._restarts = Restarts()
        self._away: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcement: asyncio.Task[None] | None = None

    def watch(self, process: ServiceProcess) -> ServiceProcess:
        """Hears of its death, and of those of its replacements, from now on."""
        self._run(self._keep(process))
        return process

    def stop(self) -> None:
        """Neither starts nor says anything from now on."""
        for task in self._tasks:
            task.cancel()

    async def close(self) -> None:
        """Stops, and waits until nothing here uses the fleet any more."""
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_result(error)

    async def _keep(self, process: ServiceProcess) -> None:
        """Raises when it has died and may not be started again."""
        first = process
        await _end(process)
        while self.restarting and self._restarts.allow(process.name, process.has_been_ready):
            self._away.add(process.name)
            if self._announcement is not None:
                self._announcement.cancel()
            self._on_death(process)
            dead, process = process, self._start_again(process)
            await asyncio.to_thread(dead.close)
            # All have been ready before anything is started again.
            await self._follow(process, start_limit_s(first.wait_ready().after_s, self._longest_start_s))
        raise process.failure()

    def _start_again(self, dead: ServiceProcess) -> ServiceProcess:
        try:
            return self._fleet.start_again(dead)
        except OSError as error:
            raise CliError(f"{dead.name} could not be started again: {error}") from None

    async def _follow(self, process: ServiceProcess, limit_s: float) -> None:
        """From its start to its end."""
        end = self._run(_end(process))
        # Gathered, so that who is not ready because it died has died, and raises nothing.
        ready = asyncio.gather(asyncio.wrap_future(process.ready), return_exceptions=True)
        either: set[asyncio.Future[Any]] = {ready, end}
        await asyncio.wait(either, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if process.has_been_ready:
            self._away.discard(process.name)
            if not self._away:
                self._announcement = self._run(self._announce())
        elif not end.done():
            process.kill()
        await end

    async def _announce(self) -> None:
        """Says that all are ready when they serve, as at the first start: until then the router may know no engine."""
        await asyncio.gather(*map(self._serves, self._fleet.processes))
        self._on_ready()

    async def _serves(self, process: ServiceProcess) -> None:
        """Comes when it serves. One that dies meanwhile is heard of by itself, which ends this."""
        serving = asyncio.ensure_future(_serves(process.address, self._longest_start_s))
        try:
            await asyncio.wait({serving}, timeout=_SLOW_S)
            if not serving.done():
                self._on_slow(process)
            await serving
        finally:
            serving.cancel()


async def _serves(address: str, timeout_s: float) -> None:
    """Comes when it serves, which is asked for again where the answer breaks off or takes too long."""
    while True:
        try:
            return await wait_serving(address, timeout_s)
        except CliError:
            await asyncio.sleep(_PAUSE_S)


async def _end(process: ServiceProcess) -> None:
    """Comes when it has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
