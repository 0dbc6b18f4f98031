"""What every service does the same way: bind, health, reflection, TLS, metrics, signals, drain.

async def main(config: EngineConfig) -> None:        # EngineConfig inherits ServerConfig
    server = Server(config, "engine")                # inside the running loop
    add_EngineServiceServicer_to_server(servicer, server.grpc)
    await server.start()
    server.set_serving("microserve.engine.v1.EngineService", True)
    server.announce()                                # the READY line
    await server.run(on_drain=servicer.drain)        # until SIGTERM, SIGINT or the launcher's death
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.rpc import reflection
from services.rpc.bind import advertised_address, bind, check_free, split_address
from services.rpc.health import HealthService
from services.rpc.interceptor import ErrorInterceptor
from services.rpc.lifeline import Lifeline
from services.rpc.metrics import BUILD, MetricsServer
from services.rpc.printed import Printed
from services.rpc.server_config import ServerConfig, server_options
from services.rpc.version import package_version

__all__ = ["Server", "ServerConfig", "announce_ready"]

log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PLUMBING = (health.SERVICE_NAME, *reflection.NAMES)


class Server:
    """One gRPC server with everything around it. Make it inside the running loop.

    `grpc` takes the servicers, before start(); `bound` and `advertised` are known after it.
    """

    def __init__(
        self, config: ServerConfig, service_name: str, *, interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    ) -> None:
        """What `interceptors` raise becomes a status as what handlers raise does."""
        self.config = config
        self.service_name = service_name
        self.bound = ""
        self.metrics_address: str | None = None
        self.grpc = grpc.aio.server(interceptors=[ErrorInterceptor(), *interceptors], options=server_options(config))
        self._names: list[str] = []  # services registered on self.grpc
        self._record_registrations()
        self._serving: dict[str, bool] = {}
        self._health = HealthService()
        self._lifeline: Lifeline | None = None
        self._metrics: MetricsServer | None = None
        self._announced = False
        self._stopping = asyncio.Event()
        self._grace_s = config.grace_s

    @property
    def advertised(self) -> str:
        """host:port for other machines to call."""
        return advertised_address(self.config.advertise, self.bound)

    def watch_launcher(self) -> None:
        """Ends the process when its launcher is gone; StartError if the lifeline is no descriptor. start() does it, and
        who has much to do before calls it first."""
        if self.config.lifeline_fd is not None and self._lifeline is None:
            self._lifeline = Lifeline(self.config.lifeline_fd, self._launcher_lost)

    def check(self) -> None:
        """What start() would fail of now, for who has much to do before it. PortInUse, StartError."""
        config = self.config
        self._credentials()
        if not config.reuse_port:
            check_free(*split_address(config.listen))
        if config.metrics_port is not None:
            check_free(config.metrics_host, config.metrics_port)

    async def start(self) -> str:
        """Binds, serves, and returns the bound host:port. Every service is NOT_SERVING until set_serving.

        PortInUse or StartError if it cannot; nothing is left open then.
        """
        own = tuple(self._names)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.add_reflection((*own, health.SERVICE_NAME), self.grpc)
        for name in ("", *own):
            await self._health.set(name, _NOT_SERVING)
        config = self.config
        credentials = self._credentials()
        try:
            self.watch_launcher()
            if config.metrics_port is not None:
                self._metrics = MetricsServer(config.metrics_port, host=config.metrics_host)
                self.metrics_address = self._metrics.address
            # Last: a port that grpc has bound but not begun to serve is freed with the object only.
            self.bound = bind(self.grpc, config.listen, credentials, shared=config.reuse_port)
            await self.grpc.start()
        except BaseException:
            await self.stop(0)
            raise
        return self.bound

    def set_serving(self, full_service_name: str, serving: bool) -> asyncio.Task[None]:
        """Sets the health of one service, and of the server as a whole: it serves when all its services do.

        Takes effect in order of the calls; awaiting the task is needed only by who must know that it has.
        """
        self._serving[full_service_name] = serving
        whole = all(self._serving.get(name, False) for name in self._names if name not in _PLUMBING)
        return asyncio.create_task(self._publish({full_service_name: serving, "": whole}))

    def announce(self, metrics: str | None = None) -> None:
        """Prints the READY line that launchers wait for. From here on signals drain, even before run().

        `metrics`: host:port of /metrics where it is not this server's own.
        """
        self._announced = True
        self._handle_signals()
        BUILD.info({"service": self.service_name, "version": package_version()})
        announce_ready(self.service_name, self.advertised, metrics or self.metrics_address)

    def request_stop(self, grace_s: float | None = None) -> None:
        """Makes run() drain and return. `grace_s` shortens the configured grace."""
        if grace_s is not None:
            self._grace_s = min(self._grace_s, grace_s)
        self._stopping.set()

    async def run(self, on_drain: Callable[[], Awaitable[None]] | None = None) -> None:
        """Serves until SIGTERM, SIGINT, request_stop or the end of the lifeline; then drains.

        Drain: health says NOT_SERVING, `on_drain` runs, clients get GOAWAY, calls may end within the grace,
        what is left is cancelled. A second signal cuts the grace short. A lost launcher gets no grace.
        """
        self._handle_signals()
        try:
            await self._stopping.wait()
            await self._drain(on_drain)
        finally:
            for number in _SIGNALS:
                asyncio.get_running_loop().remove_signal_handler(number)

    async def stop(self, grace_s: float | None = None) -> None:
        """Stops serving: no new calls, those under way get `grace_s` seconds. Idempotent."""
        await self._health.end_watches()
        await self.grpc.stop(grace_s)
        if self._lifeline is not None:
            self._lifeline.close()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
            self._metrics = None

    def _credentials(self) -> grpc.ServerCredentials | None:
        tls = self.config.server_tls
        return tls.grpc_credentials() if tls is not None else None

    async def _drain(self, on_drain: Callable[[], Awaitable[None]] | None) -> None:
        log.info("draining", extra={"fields": {"grace_s": self._grace_s}})
        await self._health.enter_graceful_shutdown()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_s
        if on_drain is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await on_drain()
            except TimeoutError:
                log.warning("drain did not end within the grace")
            except Exception:
                log.exception("drain failed")
        await self.stop(max(0.0, deadline - loop.time()))

    async def _publish(self, serving: dict[str, bool]) -> None:
        for name, value in serving.items():
            await self._health.set(name, _SERVING if value else _NOT_SERVING)

    def _handle_signals(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            log.warning("second signal: calls under way are cancelled")
            self._cut = asyncio.create_task(self.grpc.stop(0))
        log.info("signal", extra={"fields": {"signal": number.name}})
        self.request_stop()

    def _launcher_lost(self) -> None:
        log.warning("the launcher is gone")
        if not self._announced:
            # Nothing is under way yet, and what loads in a thread could not be cancelled.
            signal.raise_signal(signal.SIGTERM)
        if self._stopping.is_set():
            self._cut = asyncio.create_task(self.grpc.stop(0))
        self.request_stop(grace_s=0)

    def _record_registrations(self) -> None:
        """Remembers what generated code registers, so that health and reflection need no second list."""
        server: Any = self.grpc  # one method is replaced on the instance, which no type allows
        register = server.add_registered_method_handlers

        def record(service_name: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
            self._names.append(service_name)
            register(service_name, handlers)

        server.add_registered_method_handlers = record


def announce_ready(service: str, address: str, metrics: str | None = None) -> None:
    """Prints `READY {"service":..,"address":..,"metrics":..}` on stdout: the event that launchers wait for."""
    line = {"service": service, "address": address, "metrics": metrics}
    # run_main turns what others print away from it.
    stdout = sys.stdout.announcements if isinstance(sys.stdout, Printed) else sys.stdout
    try:
        print("READY " + json.dumps(line, separators=(",", ":")), file=stdout, flush=True)
    except OSError:
        # A launcher that stopped reading is gone or does not care; its lifeline decides.
        log.warning("nobody reads stdout")
