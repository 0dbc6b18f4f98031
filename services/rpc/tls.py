"""Certificates and keys in PEM files, which may be replaced while a process runs.

Connections that are made from then on use the new ones, those that are open go on. What is wrong with a file is said
when a service starts: gRPC says only that a handshake failed.

Issuers of short-lived certificates replace such files every few hours, some of them one file after the other.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import grpc

from services.rpc.errors import StartError
from services.rpc.reloaded import Reloaded


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a server proves itself; with `client_ca` it takes only clients signed by that. Paths of PEM files."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a grpc server. StartError if the files cannot be used."""
        certificates = Reloaded(self._paths, self._configuration)
        given = first = certificates.latest()

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # before each handshake, on threads of grpc's
            nonlocal given
            before, given = given, certificates.latest()
            return None if given is before else given

        return grpc.dynamic_ssl_server_credentials(
            first,
            fetch,  # type: ignore[arg-type]  # its stubs do not know that None means no change
            require_client_authentication=self.client_ca is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For servers that wrap sockets; each handshake is made with the latest. StartError."""
        contexts = Reloaded(self._paths, self._context)
        first = contexts.latest()

        def renew(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = contexts.latest()

        first.sni_callback = renew
        return first

    @property
    def _paths(self) -> tuple[Path | None, ...]:
        return self.cert, self.key, self.client_ca

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pairs = [_read_pair(self.cert, self.key)]
        roots = None if self.client_ca is None else _read_roots(self.client_ca)
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=roots)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Who resumes a session shows no certificate, and could do so long after its authority has been removed.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        _load_pair(context, self.cert, self.key)
        if self.client_ca is not None:
            _load_roots(context, self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client proves the server and itself. Paths of PEM files."""

    ca: Path | None = None  # None: the roots that grpc ships, or the machine's
    cert: Path | None = None  # cert and key: for servers that ask for one (mTLS)
    key: Path | None = None
    server_name: str | None = None  # expected in the server's certificate, where it is not the address's host

    def grpc_credentials(self) -> grpc.ChannelCredentials:
        """Of what the files hold now. StartError."""
        key, cert = None, None
        if self.cert is not None and self.key is not None:
            key, cert = _read_pair(self.cert, self.key)
        roots = None if self.ca is None else _read_roots(self.ca)
        return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=cert)

    def context(self) -> ssl.SSLContext:
        """The same for sockets. StartError."""
        context = ssl.create_default_context()
        if self.ca is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            _load_roots(context, self.ca)
        if self.cert is not None and self.key is not None:
            _load_pair(context, self.cert, self.key)
        return context

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """Of all files."""
        return self.ca, self.cert, self.key


@cache
def grpc_certificates(tls: ClientTls) -> Reloaded[grpc.ChannelCredentials]:
    """The same for all channels of the process: one that is made while files are being replaced gets the last that
    could be used. StartError."""
    return Reloaded(tls.paths, tls.grpc_credentials)


def check_client(tls: ClientTls | None) -> None:
    """Whether clients can be made with it. StartError."""
    if tls is not None:
        grpc_certificates(tls)


def _read_roots(path: Path) -> bytes:
    content = _read(path)
    _load_roots(_lenient(), path)
    return content


def _read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Contents of (key, cert), as gRPC takes them."""
    contents = _read(key), _read(cert)
    _load_pair(_lenient(), cert, key)
    return contents


def _load_roots(context: ssl.SSLContext, path: Path) -> None:
    _read(path)
    # As gRPC does: a file may hold the authority that issues alone, without the one above it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartError(f"{path} holds no certificates: {_why(error)}") from None
    except OSError as error:  # it opens the file again
        raise _unreadable(path, error) from None


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    for path in (key, cert):
        _read(path)  # of a file that is missing ssl does not say which
    try:
        # A password would be asked for at the terminal.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is one of the first
        raise StartError(f"{cert} and {key} are no certificate with its private key: {_why(error)}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> StartError:
    return StartError(f"cannot read {path}: {error.strerror}")


def _lenient() -> ssl.SSLContext:
    """For looking at files only. How strong a key has to be is for those to say who use it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) else str(error)
