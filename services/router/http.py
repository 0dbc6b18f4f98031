"""/health and /metrics over HTTP/1.1, without a web framework: two pages for probes and scrapers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from services.rpc.bind import join_address, split_address
from services.rpc.errors import port_in_use

_MAX_HEAD_BYTES = 1 << 14
_HEAD_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Page:
    """What is answered."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    def encode(self, *, with_body: bool) -> bytes:
        """The response; one a connection, since scrapes are seconds apart."""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (self.body if with_body else b"")


class HttpServer:
    """Answers GET and HEAD."""

    def __init__(self, is_serving: Callable[[], bool]) -> None:
        self._is_serving = is_serving
        self._server: asyncio.Server | None = None

    async def start(self, listen: str) -> str:
        """Binds host:port and returns what was bound. PortInUse, StartError."""
        host, port = split_address(listen)
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        except OSError as error:
            raise port_in_use(listen, error) from None
        return join_address(host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Frees the port."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HEAD_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.decode("latin-1").partition(" ")
                page = self._page(method, rest.partition(" ")[0])
                writer.write(page.encode(with_body=method != "HEAD"))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # not a client that waits for an answer
        finally:
            writer.close()

    def _page(self, method: str, target: str) -> Page:
        if method not in ("GET", "HEAD"):
            return Page(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n")
        match target.partition("?")[0]:
            case "/health" if self._is_serving():
                return Page(HTTPStatus.OK, b"SERVING\n")
            case "/health":
                return Page(HTTPStatus.SERVICE_UNAVAILABLE, b"NOT_SERVING\n")
            case "/metrics":
                return Page(HTTPStatus.OK, generate_latest(REGISTRY), CONTENT_TYPE_LATEST)
        return Page(HTTPStatus.NOT_FOUND, b"there are /health and /metrics\n")
