"""The options of the real services."""

from __future__ import annotations

from dataclasses import dataclass

from services.rpc.server import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransferConfig(ServerConfig):
    """A fake transfer service."""

    prefault: bool = True
    cuda_device: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig(ServerConfig):
    """A fake engine."""

    name: str
    model: str
    kvtransfer: str
    threads: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    pages: int = 1
    page_size: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig(ServerConfig):
    """A fake router."""

    http_listen: str
    policy: str
    engine: tuple[str, ...] = ()
