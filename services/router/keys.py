"""Who may call: keys that clients show as `authorization: Bearer KEY`, the same over gRPC and HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import grpc
import grpc.aio

from services.router.asking import MAX_NAME_CHARACTERS
from services.router.errors import WrongKey, WrongTenant
from services.rpc.errors import StartError
from services.rpc.interceptor import with_behaviour

HEADER = "authorization"


class Keys:
    """The keys of a router. Without any, all may call."""

    def __init__(
        self, keys: Collection[str], what: str = "API key", *, tenants: Mapping[str, str] | None = None
    ) -> None:
        """`what` they are called when one is missing; `tenants`: further keys, each with whose it is."""
        self._keys = [(key.encode(), "") for key in keys]
        self._keys += [(key.encode(), tenant) for key, tenant in (tenants or {}).items()]
        self._what = what

    def check(self, authorization: bytes) -> str:
        """The header's value, empty if there was none. Gives the tenant whose key it shows, empty: no tenant's.
        WrongKey."""
        if not self._keys:
            return ""
        scheme, _, key = authorization.partition(b" ")
        # Against every key, so that the time taken does not tell which one matched.
        matches = [tenant for known, tenant in self._keys if secrets.compare_digest(key.strip(), known)]
        if not matches or scheme.lower() != b"bearer":
            raise WrongKey(f"no valid {self._what}: send authorization: Bearer KEY")
        return matches[0]


def tenant_of(owner: str, named: str) -> str:
    """Whose a request is that shows a key of tenant `owner` and names tenant `named`, each empty if it does not.
    WrongTenant."""
    if owner and named and named != owner:
        raise WrongTenant(f"the key is that of another tenant than x-microserve-tenant names, {named[:64]!r}")
    return owner or named


def shown_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> bytes:
    """What a call shows; empty: nothing."""
    given = [value for name, value in metadata or () if name == HEADER]
    return b"".join(each if isinstance(each, bytes) else each.encode() for each in given)


def is_key(text: str) -> bool:
    """Whether a header can carry it as it stands."""
    return bool(text) and text.isascii() and text.isprintable() and text.strip() == text


def read_key(path: Path) -> str:
    """The key in a file, which may end with a newline. StartError."""
    text = _text(path).removesuffix("\n")
    if not is_key(text):
        raise StartError(f"the key in {path} must be one line of printable ASCII with no space around it")
    return text


def read_tenant_keys(path: Path) -> dict[str, str]:
    """Tenants by their keys, from a file of lines TENANT KEY. Blank lines count for nothing. StartError, also
    if it has no other: without any key all may call."""
    tenants: dict[str, str] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not all(map(is_key, words)):  # headers carry both
            raise StartError(f"line {number} of {path} must be a tenant and a key of printable ASCII")
        tenant, key = words
        if len(tenant) > MAX_NAME_CHARACTERS:
            raise StartError(f"the tenant in line {number} of {path} must have 1 to {MAX_NAME_CHARACTERS} characters")
        if key in tenants:
            raise StartError(f"the key in line {number} of {path} stands there before")
        tenants[key] = tenant
    if not tenants:
        raise StartError(f"{path} has no line with a tenant and a key")
    return tenants


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read the key in {path}: {getattr(error, 'strerror', None) or error}") from None


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
        try:
            keys.check(shown_in(handler_call_details.invocation_metadata))
        except WrongKey as error:
            return _refusing(handler, error)
        return handler


def _refusing(handler: grpc.RpcMethodHandler[Any, Any], error: WrongKey) -> grpc.RpcMethodHandler[Any, Any]:
    """A method of the same kind that only raises; what is outside makes a status of it."""

    async def refuse(request: Any, context: Any) -> NoReturn:
        raise error

    return with_behaviour(handler, refuse)
