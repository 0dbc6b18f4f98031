"""Options of the transfer service."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from services.rpc.bind import split_address
from services.rpc.server import ServerConfig
from services.rpc.tls import ClientTls


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransferConfig(ServerConfig):
    """The KV transfer service: owns the page pools of a node and moves pages between them."""

    max_pool_bytes: int | None = field(
        default=None, metadata={"help": "bytes that all pools may take; none: half of the machine's memory"}
    )
    pool_keep_s: float = field(
        default=60.0, metadata={"help": "seconds that a pool without an engine is kept for the next one"}
    )
    prefault: bool = field(default=True, metadata={"help": "allocate all memory of a pool when it is made"})
    ready_slot_count: int = field(default=256, metadata={"help": "ready counters in a pool's control page"})
    copy_threads: int = field(default=2, metadata={"help": "threads that copy pages"})
    max_copy_bytes: int = field(
        default=2 << 20,
        metadata={
            "help": "bytes copied under one check, 32 times as many within a GPU; a revoke waits for one such copy"
        },
    )
    push_stall_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds without progress after which a push fails"}
    )
    drain_timeout_s: float = field(
        default=5.0, metadata={"help": "seconds that a revoke may wait for copies under way"}
    )
    watch_interval_s: float = field(
        default=0.05, metadata={"help": "seconds between two reports of bytes written under a grant"}
    )

    data_listen: str | None = field(
        default="127.0.0.1:0",
        metadata={"help": "host:port where other transfer services connect to write KV; none: no transfers by tcp"},
    )
    data_advertise: str | None = field(
        default=None, metadata={"help": "host or host:port that other transfer services reach the data port at"}
    )
    data_connections: int = field(default=64, metadata={"help": "connections that the data port takes"})
    connections_per_peer: int = field(
        default=1, metadata={"help": "connections to the data port of one other transfer service"}
    )
    checksums: bool = field(
        default=False, metadata={"help": "check KV end to end; DATA_LOSS where it arrives other than it was sent"}
    )
    peer_tls_ca: Path | None = field(
        default=None, metadata={"help": "PEM roots of other transfer services' certificates; with it TLS to them is on"}
    )
    peer_tls_cert: Path | None = field(
        default=None, metadata={"help": "PEM certificate to show to other transfer services (mTLS)"}
    )
    peer_tls_key: Path | None = field(default=None, metadata={"help": "PEM private key of --peer-tls-cert"})

    cuda_device: int | None = field(
        default=None, metadata={"help": "number of the GPU whose memory holds the pools of GPU engines; none: no such"}
    )
    copy_kernel: bool = field(
        default=True,
        metadata={"help": "copy scattered pages on the GPU by one kernel, if its trial at the start is right"},
    )
    nccl_library: str | None = field(
        default=None,
        metadata={
            "help": "path of libnccl.so.2, or auto; with it pages on the GPU also move over NCCL; needs --cuda-device"
        },
    )
    nccl_timeout_s: float = field(
        default=10.0, metadata={"help": "seconds that one NCCL call may take before its communicator is aborted"}
    )
    nixl_devices: str | None = field(
        default=None,
        metadata={
            "help": "network devices for NIXL, as in UCX_NET_DEVICES; with it pages also move over NIXL, whose peers"
            " can reach each other's pools unchecked (docs/gpu.md)"
        },
    )

    def __post_init__(self) -> None:
        ServerConfig.__post_init__(self)
        if self.data_listen is not None:
            split_address(self.data_listen)
        if min(self.data_connections, self.connections_per_peer) < 1:
            raise ValueError("--data-connections and --connections-per-peer are at least 1")
        if self.cuda_device is not None and self.cuda_device < 0:
            raise ValueError("--cuda-device counts from 0")
        if self.nccl_library is not None and self.cuda_device is None:
            raise ValueError("--nccl-library needs --cuda-device")
        if self.nccl_timeout_s <= 0:
            raise ValueError("--nccl-timeout-s is more than 0")
        if (self.peer_tls_cert is None) != (self.peer_tls_key is None):
            raise ValueError("--peer-tls-cert and --peer-tls-key go together")
        if self.peer_tls_cert is not None and self.peer_tls_ca is None:
            raise ValueError("--peer-tls-cert needs --peer-tls-ca")
        if self.copy_threads < 1 or self.max_copy_bytes < 1 or self.ready_slot_count < 1:
            raise ValueError("--copy-threads, --max-copy-bytes and --ready-slot-count are at least 1")
        if min(self.pool_keep_s, self.watch_interval_s) < 0:
            raise ValueError("--pool-keep-s and --watch-interval-s are not negative")
        if min(self.push_stall_timeout_s, self.drain_timeout_s) <= 0:
            raise ValueError("--push-stall-timeout-s and --drain-timeout-s are more than 0")

    @property
    def peer_tls(self) -> ClientTls | None:
        """How to talk to other transfer services; None: in the clear."""
        if self.peer_tls_ca is None:
            return None
        return ClientTls(self.peer_tls_ca, self.peer_tls_cert, self.peer_tls_key)

    @property
    def pool_limit_bytes(self) -> int:
        """The limit in force."""
        if self.max_pool_bytes is not None:
            return self.max_pool_bytes
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
