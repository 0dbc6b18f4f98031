"""The one place where exceptions of handlers become statuses, and where calls are timed.

ServiceError becomes google.rpc.Status with its own code, reason and advice. Anything else is a bug: it is
logged with its traceback under a fresh id, and the client gets INTERNAL with that id and no text of ours. Two
exceptions pass: CancelledError when the call itself was cancelled, and the one that context.abort raises.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from prometheus_client import Histogram

from services.protocol.errors import Code, ServiceError
from services.rpc.status import DETAILS_KEY, to_grpc_code, to_status

log = logging.getLogger(__name__)

# Strings: generic in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

RPC_SECONDS = Histogram(
    "microserve_rpc_seconds",
    "Time from a call's arrival to its end, by method and status code.",
    ["method", "code"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)


class InternalError(ServiceError):
    """A bug on this side; the log has the rest under the id in the message."""


class Unimplemented(ServiceError):
    """The method is in the contract, but not in this service."""

    code = Code.UNIMPLEMENTED
    reason = "UNIMPLEMENTED"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps handlers of all four kinds, written as coroutines or as async generators."""

    def __init__(self) -> None:
        self._wrapped: dict[str, tuple[Handler, Handler]] = {}  # by method: a handler, and what it became

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        # None stands for a method that nobody registered; grpc answers UNIMPLEMENTED by itself.
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            self._wrapped[method] = known = (handler, _wrapped(handler, method))
        return known[1]


def refusing(error: ServiceError) -> Handler:
    """A method that only raises, whatever kind the client takes it for; what is outside makes a status of it."""

    async def refuse(requests: Any, context: Context) -> NoReturn:
        raise error

    # A stream of requests: grpc reads the one request of another kind before it asks, however large it is.
    return grpc.stream_unary_rpc_method_handler(refuse)


def _wrapped(handler: Handler, method: str) -> Handler:
    request = "stream" if handler.request_streaming else "unary"
    response = "stream" if handler.response_streaming else "unary"
    kind = f"{request}_{response}"
    wrapped: Handler = getattr(grpc, f"{kind}_rpc_method_handler")(
        _wrap(getattr(handler, kind), method),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _wrap(behaviour: Callable[[Any, Context], Any], method: str) -> Callable[[Any, Context], Any]:
    if inspect.isasyncgenfunction(behaviour):

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            async with _guarded(context, method), aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return generate

    async def call(request: Any, context: Context) -> Any:
        async with _guarded(context, method):
            return await behaviour(request, context)

    return call


@asynccontextmanager
async def _guarded(context: Context, method: str) -> AsyncIterator[None]:
    """Ends the call with the right status if the body raises. Cancelling leaves nothing behind."""
    begin = time.monotonic()
    code = "OK"
    try:
        yield
    except asyncio.CancelledError as error:
        code = "CANCELLED"
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Somebody cancelled a task that this handler was waiting for. grpc would take it for the end of the
        # call and send no status at all, and the client would wait for ever.
        code = "INTERNAL"
        await _abort(context, internal_error(method, error))
    except grpc.aio.AbortError:
        code = "ABORTED_BY_HANDLER"
        raise
    except ServiceError as error:
        code = error.code.name
        await _abort(context, error)
    except Exception as error:
        # Generated code sets the code and raises for a method that the servicer leaves out; tensor libraries
        # raise the same exception for bugs.
        absent = isinstance(error, NotImplementedError) and context.code() == grpc.StatusCode.UNIMPLEMENTED
        failure = Unimplemented(f"{method} is not implemented") if absent else internal_error(method, error)
        code = failure.code.name
        await _abort(context, failure)
    finally:
        RPC_SECONDS.labels(method, code).observe(time.monotonic() - begin)


def internal_error(method: str, error: BaseException) -> InternalError:
    """Logs a bug and makes the error that names its log record."""
    failure_id = uuid.uuid4().hex
    log.error("call failed", exc_info=error, extra={"fields": {"method": method, "failure": failure_id}})
    return InternalError(f"internal error {failure_id}")


async def _abort(context: Context, error: ServiceError) -> Any:
    """Never returns: grpc's abort raises."""
    status = to_status(error)
    await context.abort(to_grpc_code(error.code), status.message, ((DETAILS_KEY, status.SerializeToString()),))
