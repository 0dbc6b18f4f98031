"""What every service can be told about serving: addresses, TLS, metrics, grace, limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.rpc.bind import split_address
from services.rpc.channel import MAX_MESSAGE_BYTES, Options, keepalive_options
from services.rpc.log import LEVELS
from services.rpc.tls import ServerTls

# An engine sends its tokenizer in pieces of 1 MiB: with much less, router and engine cannot meet.
_LEAST_MESSAGE_BYTES = 2 * 1024 * 1024
HANDSHAKE_TIMEOUT_MS = 20_000
# A call that waits holds its whole body and some 20 kB more (measured: 82 kB with a body of 60 kB, 2.9 MB with one of
# 3 MB), and nobody has asked for its key yet: 0.7 GB in all with bodies of 60 kB. Bursts of 4,000 are answered.
_MAX_NOT_TAKEN = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What all services share; each inherits it and adds its own."""

    listen: str = field(default="127.0.0.1:0", metadata={"help": "host:port to serve gRPC on; port 0: a free one"})
    advertise: str | None = field(
        default=None, metadata={"help": "host or host:port that others reach this service at"}
    )
    tls_cert: Path | None = field(default=None, metadata={"help": "PEM certificate chain; with it TLS is on"})
    tls_key: Path | None = field(default=None, metadata={"help": "PEM private key of --tls-cert"})
    tls_client_ca: Path | None = field(
        default=None, metadata={"help": "PEM roots that clients must be signed by (mTLS)"}
    )
    metrics_host: str = field(default="127.0.0.1", metadata={"help": "address to serve /metrics on"})
    metrics_port: int | None = field(
        default=0, metadata={"help": "port to serve /metrics on; 0: a free one, none: off"}
    )
    grace_s: float = field(default=30.0, metadata={"help": "seconds that calls may take to end after SIGTERM"})
    max_message_bytes: int = field(
        default=MAX_MESSAGE_BYTES, metadata={"help": "largest message taken or sent, in bytes"}
    )
    reuse_port: bool = field(default=False, metadata={"help": "let several processes share the port"})
    log_level: str = field(default="info", metadata={"help": "least level of what is logged", "choices": LEVELS})
    lifeline_fd: int | None = field(
        default=None, metadata={"help": "descriptor whose end stops the service", "hidden": True}
    )

    def __post_init__(self) -> None:
        split_address(self.listen)
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.grace_s < 0:
            raise ValueError("--grace-s is negative")

    @property
    def server_tls(self) -> ServerTls | None:
        """What is shown to callers; None: in clear text."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca)

    def check_message_bytes(self) -> None:
        """For engines and routers, which could not meet otherwise. ValueError."""
        if self.max_message_bytes < _LEAST_MESSAGE_BYTES:
            raise ValueError(f"--max-message-bytes must be at least {_LEAST_MESSAGE_BYTES}")


def server_options(config: ServerConfig) -> Options:
    """The same as arguments of a grpc server."""
    return [
        *keepalive_options(),
        # Whoever pings is welcome: a busy machine reads pings late and one right after the other, and other people's
        # clients ping as they like.
        ("grpc.http2.max_ping_strikes", 0),
        # Two minutes by default, for which whoever says nothing holds a descriptor.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        # Calls that came faster than they are taken, as after the process stood still. From 1000 on grpc would end some
        # as CANCELLED, which tells a client nothing: whoever is too many is to be refused with a reason and advice.
        ("grpc.server.max_pending_requests", _MAX_NOT_TAKEN),
        ("grpc.server.max_pending_requests_hard_limit", _MAX_NOT_TAKEN),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # With it two services could share a port by accident, and each would get half of the calls.
        ("grpc.so_reuseport", int(config.reuse_port)),
    ]
