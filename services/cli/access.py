"""How the commands reach a router: keys to show and certificates to trust, from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc.aio

from services.cli.errors import UsageError
from services.cli.key_file import find_key
from services.rpc.bind import split_address
from services.rpc.channel import make_channel
from services.rpc.errors import StartError
from services.rpc.tls import ClientTls, check_client

# The router's own options, so that one variable serves `microserve up` and the commands beside it.
KEY_VARIABLE = "MICROSERVE_ROUTER_API_KEY"
ADMIN_KEY_VARIABLE = "MICROSERVE_ROUTER_ADMIN_KEY"
# PEM files. With the first the commands talk TLS; the others are for routers that want a certificate.
CA_VARIABLE = "MICROSERVE_CLI_TLS_CA"
CERTIFICATE_VARIABLE = "MICROSERVE_CLI_TLS_CERT"
PRIVATE_KEY_VARIABLE = "MICROSERVE_CLI_TLS_KEY"
_ADMIN_METHODS = "/microserve.router.v1.AdminService/"


def router_channel(address: str) -> grpc.aio.Channel:
    """A channel to the router; the caller closes it. UsageError if the address is none, or a certificate cannot be
    used."""
    try:
        split_address(address)
    except ValueError as error:
        raise UsageError(f"--address {error}") from None
    client_key = _first(KEY_VARIABLE)
    operator_key = _first(ADMIN_KEY_VARIABLE) or find_key(address) or client_key
    return make_channel(address, _tls(), interceptors=showing(client_key, operator_key))


def _tls() -> ClientTls | None:
    ca, certificate, key = (
        Path(value) if value else None
        for value in map(os.environ.get, (CA_VARIABLE, CERTIFICATE_VARIABLE, PRIVATE_KEY_VARIABLE))
    )
    if (certificate is None) != (key is None):
        raise UsageError(f"{CERTIFICATE_VARIABLE} and {PRIVATE_KEY_VARIABLE} go together")
    if ca is None:
        if certificate is not None:
            raise UsageError(f"{CERTIFICATE_VARIABLE} needs {CA_VARIABLE}")
        return None
    tls = ClientTls(ca, certificate, key)
    try:
        check_client(tls)
    except StartError as error:
        raise UsageError(str(error)) from None
    return tls


def showing(client_key: str, operator_key: str) -> tuple[grpc.aio.ClientInterceptor, ...]:
    """Interceptors that show a key with every call, AdminService the second one; an empty one is none."""
    return _KeyForReplies(client_key, operator_key), _KeyForStreams(client_key, operator_key)


class _Shown:
    def __init__(self, client_key: str, operator_key: str) -> None:
        self._client_key, self._operator_key = client_key, operator_key

    def add_to(self, details: Any) -> Any:
        method = details.method if isinstance(details.method, str) else details.method.decode()
        key = self._operator_key if method.startswith(_ADMIN_METHODS) else self._client_key
        if not key:
            return details
        shown = ("authorization", f"Bearer {key}")
        return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), shown))


class _KeyForReplies(_Shown, grpc.aio.UnaryUnaryClientInterceptor):
    """Shows the router's key with every call that has one reply."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_to(client_call_details), request)


class _KeyForStreams(_Shown, grpc.aio.UnaryStreamClientInterceptor):
    """Shows it with every call that has a stream of replies."""

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_to(client_call_details), request)


def _first(variable: str) -> str:
    return os.environ.get(variable, "").partition(",")[0].strip()
