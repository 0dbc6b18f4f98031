"""Client channels, and the wire settings that client and server must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import grpc.aio

from services.rpc.renewing_channel import RenewingChannel
from services.rpc.tls import ClientTls, grpc_certificates

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
# A long prefill sends no data, so a dead peer is found by pings alone.
KEEPALIVE_INTERVAL_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
CONNECT_TIMEOUT_MS = 5_000

Options = list[tuple[str, int | str]]


def keepalive_options() -> Options:
    """Pings that both sides send, while calls are open, to find a peer that vanished without a word.

    Not on idle channels: a server of grpcio 1.85 takes those for abuse after the third, whatever it permits.
    """
    return [
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def make_channel(
    address: str,
    tls: ClientTls | None = None,
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """A channel to host:port. It connects on the first call, and must be closed by the caller. StartError if the files
    of `tls` cannot be used and never could be."""
    options: Options = [
        *keepalive_options(),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Reconnect quickly: an engine that restarts is back within seconds, not minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # For one attempt, whatever its name says; a network may be far away, and TLS takes several round trips.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Addresses matter and are direct: a proxy named by the environment is for other traffic.
        ("grpc.enable_http_proxy", 0),
        # Channels of one process must not share a connection: one that is closed must not hurt another.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))

    def connect(credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

    return RenewingChannel(grpc_certificates(tls), connect)
