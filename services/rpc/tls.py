"""PEM files for TLS, looked at when a service starts: of one that is wrong gRPC says only that a handshake failed."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from services.rpc.channel import ClientTls
from services.rpc.errors import StartError


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Of these files. With `client_ca` only clients signed by it get in. StartError."""
    pairs = [_read_pair(cert, key)]
    roots = None if client_ca is None else _read_roots(client_ca)
    return grpc.ssl_server_credentials(pairs, root_certificates=roots, require_client_auth=roots is not None)


def check_client(tls: ClientTls | None) -> None:
    """Whether clients can be made with it. StartError."""
    if tls is None:
        return
    if tls.ca is not None:
        _read_roots(tls.ca)
    if tls.cert is not None and tls.key is not None:
        _read_pair(tls.cert, tls.key)


def _read_roots(path: Path) -> bytes:
    content = _read(path)
    try:
        _context().load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"{path} holds no certificates: {_why(error)}") from None
    return content


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Contents of (key, cert), as gRPC takes them."""
    contents = _read(key), _read(cert)
    try:
        # A password would be asked for at the terminal.
        _context().load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise StartError(f"{cert} and {key} are no certificate with its private key: {_why(error)}") from None
    return contents


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from None


def _context() -> ssl.SSLContext:
    """For looking at files only. How strong a key has to be is for those to say who use it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) else str(error)
