"""Addresses: taking "host:port" apart, and binding a grpc server so that a failure names its cause."""

from __future__ import annotations

import socket

import grpc
import grpc.aio

from services.rpc.errors import StartError, port_in_use

# Hosts that only this machine reaches.
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


def split_address(address: str) -> tuple[str, int]:
    """("127.0.0.1", 50051) from "127.0.0.1:50051", ("::1", 0) from "[::1]:0". ValueError for others."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of split_address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised_address(advertise: str | None, bound: str) -> str:
    """What others shall call: `advertise`, with the bound port where it names none or 0; else `bound`."""
    if advertise is None:
        return bound
    try:
        host, port = split_address(advertise)
    except ValueError:
        host, port = advertise, 0
    return join_address(host, port or split_address(bound)[1])


def bind(
    server: grpc.aio.Server,
    listen: str,
    credentials: grpc.ServerCredentials | None,
    *,
    shared: bool = False,
) -> str:
    """Binds and returns the bound host:port. `shared`: SO_REUSEPORT is on. PortInUse, StartError."""
    host, port = split_address(listen)
    if not shared:
        check_free(host, port)
    try:
        if credentials is None:
            return join_address(host, server.add_insecure_port(listen))
        return join_address(host, server.add_secure_port(listen, credentials))
    except RuntimeError as error:
        raise StartError(f"cannot listen on {listen}: {error}") from None


def check_free(host: str, port: int) -> None:
    """Whether one could listen there now; always, for port 0. PortInUse, StartError."""
    # Of grpc one learns only that it failed, after lines of its own on stderr.
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As grpc binds: a port that is merely in TIME_WAIT is no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, OverflowError) as error:
        raise port_in_use(join_address(host, port), error) from None
