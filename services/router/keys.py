"""Who may call: keys that clients show as `authorization: Bearer KEY`, the same over gRPC and HTTP."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from hashlib import blake2b
from typing import Any, TypeAlias

import grpc
import grpc.aio

from services.router.errors import WrongKey, WrongTenant
from services.rpc.interceptor import refusing

HEADER = "authorization"
_PEPPER = secrets.token_bytes(16)
# The keys that a file holds now, as fingerprints, each with the tenant whose it is, empty: no tenant's.
KeyFile: TypeAlias = "Callable[[], Mapping[bytes, str]]"


class Keys:
    """The keys of a router. Without any, all may call."""

    def __init__(self, keys: Collection[str], what: str = "API key", *, file: KeyFile | None = None) -> None:
        """`what` they are called when one is missing; `file` has further keys."""
        self._keys = dict.fromkeys(map(fingerprint, keys), "")
        self._file = file
        self._what = what

    def check(self, authorization: bytes) -> str:
        """The header's value, empty if there was none. Gives the tenant whose key it shows, empty: no tenant's.
        WrongKey."""
        if not self._keys and self._file is None:
            return ""
        scheme, _, key = authorization.partition(b" ")
        shown = fingerprint(key.strip())
        tenant = self._keys.get(shown)
        if tenant is None and self._file is not None:
            tenant = self._file().get(shown)
        if tenant is None or scheme.lower() != b"bearer":
            raise WrongKey(f"no valid {self._what}: send authorization: Bearer KEY")
        return tenant


def fingerprint(key: str | bytes) -> bytes:
    """Stands for a key where one is looked for among many: how long that takes tells nothing of any key, since nobody
    outside knows a fingerprint."""
    return blake2b(key.encode() if isinstance(key, str) else key, digest_size=16, key=_PEPPER).digest()


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
            return refusing(error)
        return handler
