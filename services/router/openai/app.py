"""The HTTP door as an ASGI application: routes, who may come in, and what errors look like."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import Message, Receive, Scope, Send

from services.protocol.errors import ServiceError
from services.router.fleet.registry import Model
from services.router.http import ClientGone
from services.router.keys import HEADER, Keys
from services.router.metrics import HTTP_REQUESTS
from services.router.openai.calls import chat, completion
from services.router.openai.errors import Refusal, refusal
from services.router.openai.generation import OWNER, Generation, HttpLimits
from services.router.openai.shapes import ChatShape, CompletionShape
from services.router.service import GenerationService

log = logging.getLogger(__name__)

_API = "/v1/"
_CLIENT_GONE = 499  # nobody sees it but the metrics


class HttpApp:
    """Serves a GenerationService. `is_serving` is what /health tells."""

    def __init__(
        self,
        service: GenerationService,
        is_serving: Callable[[], bool],
        limits: HttpLimits,
        keys: Keys,
    ) -> None:
        self._service = service
        self._is_serving = is_serving
        self._keys = keys
        self._max_calls = limits.max_calls
        self._draining = False
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        routes: list[BaseRoute] = [
            Route("/health", self._health),
            Route("/metrics", _metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", Generation(service, completion, CompletionShape, limits), methods=["POST"]),
            Route("/v1/chat/completions", Generation(service, chat, ChatShape, limits), methods=["POST"]),
        ]
        self._paths = {route.path for route in routes if isinstance(route, Route)}
        self._router = Router(routes, redirect_slashes=False)

    async def drain(self) -> None:
        """Takes no new work from now on, and waits for what is under way. Cancelling ends only the waiting."""
        self._draining = True
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"date", formatdate(usegmt=True).encode())]
            await send(message)

        # With it the router raises what it refuses, in place of answering in plain text.
        scope["app"] = self
        try:
            with self._counted(scope["path"]):
                self._admit(scope)
                await self._router(scope, receive, send_and_see)
        except ClientGone:
            pass
        except Exception as error:
            refused = _refusal(error, scope["path"])
            if status:
                raise  # too late to answer: the connection ends
            await JSONResponse(refused.body(), refused.status, refused.headers())(scope, receive, send_and_see)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            HTTP_REQUESTS.labels(path, str(status or _CLIENT_GONE)).inc()

    @contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        """Counts a call of the API for as long as the block runs."""
        number = int(path.startswith(_API))
        self._num_calls += number
        if number:
            self._idle.clear()
        try:
            yield
        finally:
            self._num_calls -= number
            if not self._num_calls:
                self._idle.set()

    def _admit(self, scope: Scope) -> None:
        """Refusal, WrongKey for who may not use the API, or not now. Health and metrics are open."""
        if not scope["path"].startswith(_API):
            return
        scope[OWNER] = self._keys.check(b"".join(value for name, value in scope["headers"] if name == HEADER.encode()))
        if self._draining:
            raise Refusal(503, "the server is about to stop", "draining")
        if self._num_calls > self._max_calls:
            raise Refusal(429, f"{self._max_calls} requests wait or run, as many as this router takes", "overloaded")

    async def _health(self, request: Request) -> Response:
        serving = self._is_serving()
        return PlainTextResponse("SERVING\n" if serving else "NOT_SERVING\n", 200 if serving else 503)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": list(map(_shown, self._service.models()))})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_shown(self._service.model(request.path_params["name"])))


async def _metrics(request: Request) -> Response:
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


def _shown(model: Model) -> dict[str, object]:
    # OpenAI says when a model was made; nobody here knows.
    return {
        "id": model.key.name,
        "object": "model",
        "created": 0,
        "owned_by": "microserve",
        "max_model_len": model.max_context,
    }


def _refusal(error: Exception, path: str) -> Refusal:
    """What the client is told. Of a bug only a name to look for in the log."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ServiceError):
        return refusal(error)
    if isinstance(error, HTTPException):
        allow = (error.headers or {}).get("Allow", "")
        what = {404: "there is nothing at this path", 405: f"this path takes {allow}"}
        return Refusal(error.status_code, what.get(error.status_code, error.detail), "unknown_url", allow=allow)
    failure_id = uuid.uuid4().hex
    log.error("call failed", exc_info=error, extra={"fields": {"path": path, "failure": failure_id}})
    return Refusal(500, f"internal error {failure_id}", "internal")
