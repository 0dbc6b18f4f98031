"""What `microserve up` is to start, checked before anything is downloaded or started."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from services.cli.errors import CliError, UsageError
from services.cli.key_file import HOST, key_path
from services.cli.models import require_engine
from services.engine.config import EngineConfig
from services.kvtransfer.config import KvTransferConfig
from services.router.config import RouterConfig
from services.router.errors import RouterError
from services.router.programs.catalogue import Catalogue
from services.rpc.bind import check_free
from services.rpc.config import ConfigError, read_config
from services.rpc.errors import StartError
from services.rpc.server_config import ServerConfig

_LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What to start. Port 0 is a free one; after any other gRPC port come those of the engines."""

    engine_count: int
    policy: str
    model: str
    grpc_port: int
    http_port: int
    admin_port: int | None  # takes uploaded programs; None: they are taken nowhere
    question: str
    dtype: str
    device: str
    json: bool

    @property
    def engine_ports(self) -> tuple[int, ...]:
        """The engines' gRPC ports: those after the router's, so that they can be written down."""
        return tuple(self.grpc_port and self.grpc_port + 1 + number for number in range(self.engine_count))


def check(options: UpOptions) -> None:
    """Finds what is wrong with them. UsageError, CliError for a port that is taken."""
    require_engine()
    admin_ports = () if options.admin_port is None else (options.admin_port,)
    if options.http_port != 0 and options.http_port in (options.grpc_port, *admin_ports, *options.engine_ports):
        raise UsageError("--http-port must differ from the gRPC ports of router and engines")
    if options.admin_port in (options.grpc_port, *options.engine_ports):
        raise UsageError("--admin-port must differ from the other ports")
    if max(options.engine_ports) > _LAST_PORT:
        raise UsageError(f"--grpc-port {options.grpc_port} leaves no ports for {options.engine_count} engines")
    _check_router(options)
    _check_others(options)
    ports = dict.fromkeys((options.grpc_port, *options.engine_ports), "--grpc-port")
    ports |= {options.http_port: "--http-port"} | dict.fromkeys(admin_ports, "--admin-port")
    for port, option in ports.items():
        try:
            check_free(HOST, port)
        except StartError as error:
            raise CliError(f"{error}: {option} takes another") from None


def _check_router(options: UpOptions) -> None:
    """As the router will, but before engines have loaded their model."""
    try:
        words = ["--engine", f"{HOST}:0", "--policy", options.policy]
        if options.admin_port is not None:
            words += uploads(options.admin_port)
        config = read_config(RouterConfig, words, "microserve-router", os.environ)
        if config.tls_cert is not None:
            raise UsageError(
                "`up` is for trying out, without TLS: unset the variables of --tls-cert, or start services by hand"
            )
        Catalogue(config.policy_file, config.policy)
    except ConfigError as error:
        raise UsageError(f"microserve-router: {error}") from None
    except RouterError as error:
        raise UsageError(f"--policy {options.policy}: {error.message}") from None


def _check_others(options: UpOptions) -> None:
    """As engines and the KV transfer service will, but before a model is fetched."""
    of_engine = ["--model", options.model, "--dtype", options.dtype, "--device", options.device]
    configs: list[tuple[type[ServerConfig], str, Sequence[str]]] = [
        (EngineConfig, "microserve-engine", of_engine),
        (KvTransferConfig, "microserve-kvtransfer", gpu_options(options.device)),
    ]
    for config, prog, words in configs:
        try:
            read_config(config, words, prog, os.environ)
        except ConfigError as error:
            raise UsageError(f"{prog}: {error}") from None


def uploads(port: int) -> tuple[str, ...]:
    """What a router is to be told that takes programs at `port`."""
    key_file = str(key_path(port))
    return "--allow-policy-upload", "--admin-listen", f"{HOST}:{port}", "--upload-key-file", key_file


def gpu_options(device: str) -> tuple[str, ...]:
    """What the KV transfer service of engines on `device` is to be told of it."""
    kind, _, number = device.partition(":")
    return ("--cuda-device", number or "0") if kind == "cuda" else ()
