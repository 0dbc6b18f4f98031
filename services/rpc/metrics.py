"""/metrics in the Prometheus text format, on a thread of its own so that a busy loop still answers."""

from __future__ import annotations

import io
import socket
from socketserver import ThreadingMixIn
from threading import BoundedSemaphore, Thread
from time import monotonic, sleep
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, CollectorRegistry, Info, disable_created_metrics, make_wsgi_app

from services.rpc.bind import join_address
from services.rpc.errors import PortInUse, port_in_use

# When each counter began: as many series again, which rate() does without.
disable_created_metrics()  # type: ignore[no-untyped-call]

BUILD = Info("microserve_build", "Which service this is, and of which version.")

# How long close() may have to wait for the thread.
_POLL_INTERVAL_S = 0.1
# Prometheus gives up after as long by default. Who reads or asks more slowly must not hold a thread for ever.
_SCRAPE_TIMEOUT_S = 10.0
_MOST_SCRAPES = 16  # at once; more are closed unanswered
_NO_DESCRIPTOR_PAUSE_S = 0.2


class _QuietHandler(WSGIRequestHandler):
    timeout = _SCRAPE_TIMEOUT_S

    def setup(self) -> None:
        """As for any handler, but `timeout` is one for all of what is asked."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection, self.timeout))

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""


class _Request(io.RawIOBase):
    """What a client says within `patience_s` seconds from now."""

    def __init__(self, connection: socket.socket, patience_s: float) -> None:
        self._connection = connection
        self._ends_s = monotonic() + patience_s

    def readable(self) -> bool:
        """See io.RawIOBase."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See io.RawIOBase. TimeoutError."""
        left_s = self._ends_s - monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._connection.settimeout(left_s)
        return self._connection.recv_into(buffer)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """One slow reader does not stop the next."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self._free = BoundedSemaphore(_MOST_SCRAPES)
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            # Out of descriptors: without a pause this would be called at once again.
            sleep(_NO_DESCRIPTOR_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread that would
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that stops in the middle is no news either."""


class MetricsServer:
    """Serves `registry` at http://host:port/metrics from construction until close().

    Port 0 takes a free one; `address` has the one taken. PortInUse, StartError if it cannot be bound.
    """

    def __init__(self, port: int, *, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY) -> None:
        try:
            self._server = make_server(
                host, port, make_wsgi_app(registry), _ThreadingServer, handler_class=_QuietHandler
            )
        except (OSError, OverflowError) as error:
            raise port_in_use(join_address(host, port), error) from None
        self.address = join_address(host, self._server.server_port)
        self._thread = Thread(target=self._server.serve_forever, args=(_POLL_INTERVAL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port. Idempotent; takes up to a tenth of a second."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


__all__ = ["BUILD", "MetricsServer", "PortInUse"]
