"""Who may call: keys that clients show as `authorization: Bearer KEY`, the same over gRPC and HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from services.router.errors import WrongKey
from services.rpc.errors import StartError
from services.rpc.interceptor import with_behaviour

HEADER = "authorization"


class Keys:
    """The keys of a router. Without any, all may call."""

    def __init__(self, keys: Collection[str], what: str = "API key") -> None:
        """`what` they are called when one is missing."""
        self._keys = tuple(key.encode() for key in keys)
        self._what = what

    def check(self, authorization: bytes) -> None:
        """The header's value, empty if there was none. WrongKey."""
        scheme, _, key = authorization.partition(b" ")
        # Against every key, so that the time taken does not tell which one matched.
        matches = [secrets.compare_digest(key.strip(), known) for known in self._keys]
        if self._keys and not (scheme.lower() == b"bearer" and any(matches)):
            raise WrongKey(f"no valid {self._what}: send authorization: Bearer KEY")


def is_key(text: str) -> bool:
    """Whether a header can carry it as it stands."""
    return bool(text) and text.isascii() and text.isprintable() and text.strip() == text


def read_key(path: Path) -> str:
    """The key in a file, which may end with a newline. StartError."""
    try:
        text = path.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the key in {path}: {getattr(error, 'strerror', None) or error}") from None
    if not is_key(text):
        raise StartError(f"the key in {path} must be one line of printable ASCII with no space around it")
    return text


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of the named services without one of their keys. Others, health and reflection among them, pass."""

    def __init__(self, keys: Mapping[str, Keys]) -> None:
        """`keys`: by service."""
        self._keys = dict(keys)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        keys = self._keys.get(handler_call_details.method.split("/")[1])
        if handler is None or keys is None:
            return handler
        given = [value for name, value in handler_call_details.invocation_metadata or () if name == HEADER]
        try:
            keys.check(b"".join(each if isinstance(each, bytes) else each.encode() for each in given))
        except WrongKey as error:
            return _refusing(handler, error)
        return handler


def _refusing(handler: grpc.RpcMethodHandler[Any, Any], error: WrongKey) -> grpc.RpcMethodHandler[Any, Any]:
    """A method of the same kind that only raises; what is outside makes a status of it."""

    async def refuse(request: Any, context: Any) -> NoReturn:
        raise error

    return with_behaviour(handler, refuse)
