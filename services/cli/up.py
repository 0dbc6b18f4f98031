"""`microserve up`: a whole suite on this machine, one answered question, then service until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from services.cli import output
from services.cli.client import router_client, wait_serving
from services.cli.commands import stream_answer
from services.cli.errors import CliError, Interrupted
from services.cli.fleet import Fleet, core_count
from services.cli.key_file import HOST, new_key
from services.cli.models import fetch
from services.cli.process import ServiceProcess
from services.cli.supervisor import Supervisor
from services.cli.up_options import UpOptions, check, gpu_options, uploads
from services.cli.values import Endpoint, Question

# By which a router says that a program holds its event loop and cannot be interrupted.
_EXIT_STUCK = 70
# Reading a large model from a slow disk takes minutes.
_START_TIMEOUT_S = 600.0
# After so long a start says what it waits for.
_LONG_START_S = 10.0


def up(options: UpOptions) -> None:
    """Runs until Ctrl-C or SIGTERM. UsageError, CliError if something cannot be had, ServiceFailed if a child dies
    before all serve, or again and again."""
    check(options)
    model = fetch(options.model, quiet=options.json)
    with ExitStack() as stack:
        if options.admin_port is not None:
            stack.enter_context(new_key(options.admin_port))
        asyncio.run(launch(options, model, Fleet()))


async def launch(options: UpOptions, model: Path, fleet: Fleet) -> None:
    """Starts everything in `fleet` and serves until a signal; the fleet is closed afterwards, whatever happens."""
    await _Launcher(options, model, fleet).run()


class _Launcher:
    """The fleet on a loop that also hears signals and the deaths of children."""

    def __init__(self, options: UpOptions, model: Path, fleet: Fleet) -> None:
        self._options = options
        self._model = model
        self._fleet = fleet
        self._interrupted = False
        self._served = False
        self._loop = asyncio.get_running_loop()
        self._supervisor = Supervisor(
            fleet, self._show_death, self._show_endpoints, self._show_slow, longest_start_s=_START_TIMEOUT_S
        )
        self._serving = self._loop.create_task(self._serve())

    async def run(self) -> None:
        """Serves until a signal. Whatever ends it, no child and no file is left."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._loop.add_signal_handler(number, self._interrupt)
        failure = None
        try:
            either: set[asyncio.Future[Any]] = {self._serving, self._supervisor.failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            failure = self._failure()
        finally:
            self._serving.cancel()
            await asyncio.wait({self._serving})
            await self._supervisor.close()
            with suppress(BrokenPipeError):
                self._say("stopping", {"event": "stopping"})
            # In a thread, so that a second Ctrl-C is heard.
            await asyncio.to_thread(self._fleet.close)
        if failure is not None:
            raise failure

    async def _serve(self) -> None:
        """Starts everything, asks the question, and then waits to be cancelled."""
        options = self._options
        self._say(f"starting kvtransfer, {options.engine_count} engines and a router")
        telling = self._loop.call_later(_LONG_START_S, self._show_awaited)
        async with asyncio.timeout(_START_TIMEOUT_S):
            try:
                router = await self._start()
            finally:
                telling.cancel()
            processes = self._fleet.processes
            await asyncio.gather(*(wait_serving(each.address, _START_TIMEOUT_S) for each in processes))
        self._show_endpoints()
        if options.question:
            await self._ask(router.address)
        self._say(f"serving gRPC at {router.address} and OpenAI's API at http://{router.metrics}/v1; Ctrl-C stops it")
        self._served = self._supervisor.restarting = True
        await asyncio.Event().wait()

    async def _start(self) -> ServiceProcess:
        """The router, once all are ready. Engines load their model at the same time."""
        options, fleet = self._options, self._fleet
        # Pools take memory as they fill: allocating all of it first may take longer than everything else here.
        kvtransfer = self._supervisor.watch(
            fleet.start_kvtransfer(extra=["--no-prefault", *gpu_options(options.device)])
        )
        await asyncio.wrap_future(kvtransfer.ready)
        threads = max(1, core_count() // options.engine_count)
        engines = []
        for number, port in enumerate(options.engine_ports):
            engine = self._supervisor.watch(
                fleet.start_engine(
                    f"engine-{number}",
                    self._model,
                    kvtransfer,
                    threads=threads,
                    dtype=options.dtype,
                    device=options.device,
                    listen=f"{HOST}:{port}",
                )
            )
            engines.append(engine)
            if options.device != "cpu":
                # Each takes half of the GPU's memory that it finds free: two at once would take all of it.
                await asyncio.wrap_future(engine.ready)
        await asyncio.gather(*(asyncio.wrap_future(engine.ready) for engine in engines))
        router = self._supervisor.watch(
            fleet.start_router(
                engines,
                options.policy,
                listen=f"{HOST}:{options.grpc_port}",
                http_listen=f"{HOST}:{options.http_port}",
                extra=() if options.admin_port is None else uploads(options.admin_port),
            )
        )
        await asyncio.wrap_future(router.ready)
        return router

    async def _ask(self, address: str) -> None:
        quiet = self._options.json
        if not quiet:
            output.say(f"\n{self._options.question}", style="bold")
        async with router_client(address) as router:
            answer = await stream_answer(router, Question(self._options.question), quiet=quiet)
        if quiet:
            output.print_json({"event": "answer", **asdict(answer)})
        else:
            output.print_legs(answer)

    def _show_endpoints(self) -> None:
        endpoints = [
            Endpoint(each.name, each.pid, each.address, each.metrics, str(each.log_path))
            for each in self._fleet.processes
        ]
        if self._options.json:
            output.print_json({"event": "ready", "endpoints": [asdict(each) for each in endpoints]})
        else:
            output.print_endpoints(endpoints)
            self._say(f"logs, until this ends: {self._fleet.folder}/SERVICE.log")
            if self._options.admin_port is not None:
                address = f"{HOST}:{self._options.admin_port}"
                self._say(f"programs: microserve policy set FILE.py --address {address}")

    def _show_death(self, process: ServiceProcess) -> None:
        is_stuck = process.service == "router" and process.poll() == _EXIT_STUCK
        why = "a program holds the router" if is_stuck else str(process.failure())
        self._say(f"{why}: starting it again", {"event": "restarting", "name": process.name})

    def _show_awaited(self) -> None:
        for process in self._fleet.processes:
            if not process.has_been_ready:
                said = process.log_tail(1)
                last = f"the last it said: {said}" if said else "it has said nothing"
                self._say(f"{process.name} is not ready yet; {last}")

    def _show_slow(self, process: ServiceProcess) -> None:
        why = f"{process.name} is ready and does not serve yet; what it says is in {process.log_path}"
        self._say(why, {"event": "waiting", "name": process.name})

    def _interrupt(self) -> None:
        if self._interrupted:
            self._fleet.kill()
        self._interrupted = True
        self._supervisor.stop()
        self._serving.cancel()

    def _failure(self) -> BaseException | None:
        """Why it ended, if not because somebody wanted it when it served."""
        if self._interrupted:
            return None if self._served else Interrupted()
        if self._supervisor.failed.done():
            return self._supervisor.failed.result()
        error = self._serving.exception()
        if isinstance(error, TimeoutError):
            return CliError(f"the services were not ready within {_START_TIMEOUT_S:g} s")
        return error

    def _say(self, text: str, event: dict[str, object] | None = None) -> None:
        """Text for people, or the event, if there is one, for programs."""
        if not self._options.json:
            output.say(text)
        elif event is not None:
            output.print_json(event)
