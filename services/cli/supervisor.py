"""Who of a fleet has died, who is started again, and when all are ready again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.client import wait_serving
from services.cli.errors import CliError
from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess
from services.cli.restarts import Restarts


class Supervisor:
    """Hears of deaths. Once `restarting` is set, it starts what died again where it was, so that the others find it.

    `failed` is done, with the reason, when a death is to end everything. `on_death` hears of each that is started
    again, `on_ready` once all are ready and serve again. Nothing here blocks the loop.
    """

    def __init__(
        self,
        fleet: Fleet,
        on_death: Callable[[ServiceProcess], None],
        on_ready: Callable[[], None],
        start_timeout_s: float,
    ) -> None:
        """A service that is started again and is not ready after `start_timeout_s` is killed, which counts as its
        death."""
        self.restarting = False
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._fleet = fleet
        self._on_death = on_death
        self._on_ready = on_ready
        self._start_timeout_s = start_timeout_s
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
        await _end(process)
        while self.restarting and self._restarts.allow(process.name):
            self._away.add(process.name)
            if self._announcement is not None:
                self._announcement.cancel()
            self._on_death(process)
            dead, process = process, self._start_again(process)
            await asyncio.to_thread(dead.close)
            await self._follow(process)
        raise process.failure()

    def _start_again(self, dead: ServiceProcess) -> ServiceProcess:
        try:
            return self._fleet.start_again(dead)
        except OSError as error:
            raise CliError(f"{dead.name} could not be started again: {error}") from None

    async def _follow(self, process: ServiceProcess) -> None:
        """From its start to its end."""
        end = self._run(_end(process))
        # Gathered, so that who is not ready because it died has died, and raises nothing.
        ready = asyncio.gather(asyncio.wrap_future(process.ready), return_exceptions=True)
        either: set[asyncio.Future[Any]] = {ready, end}
        await asyncio.wait(either, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if process.has_been_ready:
            self._away.discard(process.name)
            if not self._away:
                self._announcement = self._run(self._announce())
        elif not end.done():
            process.kill()
        await end

    async def _announce(self) -> None:
        """Says that all are ready when they serve, as at the first start: until then the router may know no engine."""
        waits = [wait_serving(process.address, self._start_timeout_s) for process in self._fleet.processes]
        try:
            await asyncio.gather(*waits)
        except CliError:
            # It died, which is heard of by itself, or it serves nothing now: then there is nothing to announce.
            return
        self._on_ready()


async def _end(process: ServiceProcess) -> None:
    """Comes when it has ended."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process)
