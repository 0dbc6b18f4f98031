"""/metrics in the Prometheus text format, on a thread of its own so that a busy loop still answers."""

from __future__ import annotations

from socketserver import ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, CollectorRegistry, disable_created_metrics, make_wsgi_app

from services.rpc.errors import PortInUse, port_in_use

# When each counter began: as many series again, which rate() does without.
disable_created_metrics()  # type: ignore[no-untyped-call]

# How long close() may have to wait for the thread.
_POLL_INTERVAL_S = 0.1


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """One slow reader does not stop the next."""

    daemon_threads = True


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
            raise port_in_use(f"{host}:{port}", error) from None
        self.address = f"{host}:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, args=(_POLL_INTERVAL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port. Idempotent; takes up to a tenth of a second."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


__all__ = ["MetricsServer", "PortInUse"]
