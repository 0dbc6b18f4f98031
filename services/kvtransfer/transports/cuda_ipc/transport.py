"""Moves pages between two pools of this service in the memory of one GPU: copies on side streams, checked piece by
piece as shm checks its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.kvtransfer.copier import Copier
from services.kvtransfer.errors import ChecksumMismatch
from services.kvtransfer.landing import Landing, Landings, LandingShard
from services.kvtransfer.leg_copy import SourceTokens, plan_copies
from services.kvtransfer.plan import PageTable
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Capabilities, Peer, Reach, Unsupported
from services.kvtransfer.transports.cuda_ipc.gpu import Gpu
from services.kvtransfer.transports.cuda_ipc.runs import RunList, piece_runs
from services.kvtransfer.transports.shm import ShmLane, ShmTransport
from services.protocol.address import KvAddress
from services.protocol.extents import Leg
from services.protocol.ranges import TokenRange

# A GPU copies so many times what the host does under one check: a piece would else be over before it is queued.
_PIECES_OF_THE_HOST = 32


class CudaIpcTransport(ShmTransport):
    """A revoke waits for at most _PIECES_OF_THE_HOST x `max_copy_bytes` of queued copies a thread."""

    def __init__(
        self, landings: Landings, copier: Copier, epoch: bytes, max_copy_bytes: int, gpu: Gpu, *, checked: bool = False
    ) -> None:
        """`checked`: the source is hashed before every copy and the target after it."""
        super().__init__(landings, copier, epoch, max_copy_bytes * _PIECES_OF_THE_HOST, checked=checked)
        self.capabilities = Capabilities("cuda_ipc", Reach.SAME_SERVICE, gpu.way)
        self._gpu = gpu

    def refuses(self, source: Pool, address: KvAddress, peer: Peer) -> Unsupported | None:
        """Pools of this service on the GPU, arranged alike."""
        if source.device_address is None:
            return Unsupported("the pool is in host memory")
        if peer.epoch != self._epoch:
            return Unsupported("the target belongs to another transfer service")
        if len(address.shards) != 1 or source.shape.layout != address.layout:
            return Unsupported("on a GPU whole models move between equal arrangements only")
        return None

    def _lane(self, landing: Landing, tokens: SourceTokens, on_change: Callable[[], None]) -> ShmLane:
        ways = [_GpuCopy(tokens, landing.shards[leg.target_index], leg, self._max_copy_bytes) for leg in landing.legs]
        return ShmLane(self._copier, landing, ways, self._copy_and_check if self._checked else self._copy, on_change)

    def _copy(self, layer: _Layer, piece: _GpuPiece) -> None:
        self._gpu.copier.copy(piece.runs, layer.target, layer.source)

    def _copy_and_check(self, layer: _Layer, piece: _GpuPiece) -> None:
        checksum = self._gpu.staging.checksum
        sent = checksum(piece.runs.sources(layer.source))
        self._copy(layer, piece)
        if checksum(piece.runs.targets(layer.target)) != sent:
            raise ChecksumMismatch(f"tokens {piece.part} of a layer")


@dataclass(frozen=True, slots=True)
class _GpuPiece:
    """What is copied under one check: the same runs in every layer, behind the layer's beginning."""

    part: TokenRange
    num_bytes: int
    runs: RunList


@dataclass(frozen=True, slots=True)
class _Layer:
    """Addresses where a layer begins in both pools."""

    source: int
    target: int


class _GpuCopy:
    """A Way between two pools that arrange their pages alike."""

    def __init__(self, tokens: SourceTokens, shard: LandingShard, leg: Leg, max_bytes: int) -> None:
        self.pool = shard.pool
        self.layers = leg.source_layers
        self._source, self._leg = tokens.pool, leg
        layout, counts = tokens.pool.shape.layout, (tokens.pool.shape.page_count, shard.pool.shape.page_count)
        source, target = (PageTable(page_ids, layout.page_size) for page_ids in (tokens.page_ids, shard.page_ids))
        token_bytes = layout.layer_page_bytes // layout.page_size
        pieces = plan_copies(tokens.part, source, target, token_bytes, max_bytes, verbatim=True)
        self.pieces = [_GpuPiece(piece.part, piece.num_bytes, piece_runs(piece, layout, *counts)) for piece in pieces]

    def layer(self, source_layer: int) -> _Layer:
        """See Way.layer."""
        return _Layer(
            _layer_address(self._source, source_layer), _layer_address(self.pool, self._leg.target_layer(source_layer))
        )


def _layer_address(pool: Pool, layer: int) -> int:
    begin = pool.device_address
    assert begin is not None
    return begin + pool.shape.layout.offset(layer, 0, pool.shape.page_count)
