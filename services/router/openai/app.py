"""The HTTP door as an ASGI application: routes, who may come in, and what errors look like."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache

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
from services.router.metrics import HTTP_REQUESTS, of
from services.router.openai.calls import chat, completion
from services.router.openai.errors import Refusal, bug, cut_off, refusal
from services.router.openai.generation import OWNER, REQUEST_ID, Generation, HttpLimits
from services.router.openai.shapes import ChatShape, CompletionShape
from services.router.service import GenerationService

_API = "/v1/"
# What they are asked has a name from the first byte on: also who is refused at the door can be told which it was.
_GENERATING = ("/v1/completions", "/v1/chat/completions")
_REQUEST_ID = b"x-request-id"
_HEADER = HEADER.encode()
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
        routes: list[BaseRoute] = [  # they are tried in this order
            Route(_GENERATING[0], Generation(service, completion, CompletionShape, limits), methods=["POST"]),
            Route(_GENERATING[1], Generation(service, chat, ChatShape, limits), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
            Route("/metrics", _metrics),
        ]
        self._paths = {route.path for route in routes if isinstance(route, Route)}
        self._router = Router(routes, redirect_slashes=False)

    async def drain(self) -> None:
        """Takes no new work from now on, and waits for what is under way. Cancelling ends only the waiting."""
        self._draining = True
        await self._idle.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0
        request_id = b""

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"date", _date(int(time.time())))]
                if request_id:
                    message["headers"].append((_REQUEST_ID, request_id))
            await send(message)

        # With it the router raises what it refuses, in place of answering in plain text.
        scope["app"] = self
        path = scope["path"]
        if path in _GENERATING:
            request_id = _request_id(scope)
            scope[REQUEST_ID] = request_id.decode("latin-1")
        is_call = path.startswith(_API)
        if is_call:
            self._num_calls += 1
            self._idle.clear()
        try:
            if is_call:
                self._admit(scope)
            await self._router(scope, receive, send_and_see)
        except ClientGone:
            pass
        except asyncio.CancelledError as error:
            if status:
                raise
            refused = cut_off(error, path)
            await JSONResponse(refused.body(), refused.status, refused.headers())(scope, receive, send_and_see)
        except Exception as error:
            refused = _refusal(error, path)
            if status:
                raise  # too late to answer: the connection ends
            await JSONResponse(refused.body(), refused.status, refused.headers())(scope, receive, send_and_see)
        finally:
            if is_call:
                self._ended()
            of(HTTP_REQUESTS, path if path in self._paths else "other", str(status or _CLIENT_GONE)).inc()

    def _ended(self) -> None:
        self._num_calls -= 1
        if not self._num_calls:
            self._idle.set()

    def _admit(self, scope: Scope) -> None:
        """Refusal, WrongKey for who may not use the API, or not now. Health and metrics are open."""
        scope[OWNER] = self._keys.check(b"".join([value for name, value in scope["headers"] if name == _HEADER]))
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


def _request_id(scope: Scope) -> bytes:
    """The client's name for it, or a new one."""
    given = next((value for name, value in scope["headers"] if name == _REQUEST_ID), b"")
    return given or b"%016x" % random.getrandbits(64)


@lru_cache(maxsize=1)
def _date(now_s: int) -> bytes:
    return formatdate(now_s, usegmt=True).encode()


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
    """What the client is told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ServiceError):
        return refusal(error)
    if isinstance(error, HTTPException):
        allow = (error.headers or {}).get("Allow", "")
        nothing = "there is nothing at this path; the API is /v1/chat/completions, /v1/completions and /v1/models"
        what = {404: nothing, 405: f"this path takes {allow}"}
        return Refusal(error.status_code, what.get(error.status_code, error.detail), "unknown_url", allow=allow)
    return bug(error, path)
