"""Moves pages between two pools of this service in the memory of one GPU: copies on side streams, checked one by one as
shm checks its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.kvtransfer.copier import Copier
from services.kvtransfer.landing import Landing, Landings, LandingShard
from services.kvtransfer.leg_copy import SourceTokens
from services.kvtransfer.plan import PageTable, Piece, plan_pieces
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.base import Capabilities, Peer, Reach, Unsupported
from services.kvtransfer.transports.cuda_ipc.copies import PoolPlace, ThreadStreams, pool_copies
from services.kvtransfer.transports.shm import ShmLane, ShmTransport
from services.protocol.address import KvAddress
from services.protocol.extents import Leg
from services.protocol.layout import PageLayout


class CudaIpcTransport(ShmTransport):
    """A revoke waits for at most `max_copy_bytes` of queued copies a thread, as with shm."""

    capabilities = Capabilities("cuda_ipc", Reach.SAME_SERVICE)

    def __init__(
        self, landings: Landings, copier: Copier, epoch: bytes, max_copy_bytes: int, streams: ThreadStreams
    ) -> None:
        super().__init__(landings, copier, epoch, max_copy_bytes)
        self._streams = streams

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
        return ShmLane(self._copier, landing, ways, self._copy_piece, on_change)

    def _copy_piece(self, places: _Places, piece: Piece) -> None:
        self._streams.copy(pool_copies(places.source, places.target, piece.runs, places.layout))


class _GpuCopy:
    """A Way between two pools that arrange their pages alike."""

    def __init__(self, tokens: SourceTokens, shard: LandingShard, leg: Leg, max_bytes: int) -> None:
        self.pool = shard.pool
        self.layers = leg.source_layers
        self._source, self._leg = tokens.pool, leg
        layout = tokens.pool.shape.layout
        source, target = (PageTable(page_ids, layout.page_size) for page_ids in (tokens.page_ids, shard.page_ids))
        self.pieces = plan_pieces(tokens.part, source, target, layout.layer_page_bytes // layout.page_size, max_bytes)

    def layer(self, source_layer: int) -> _Places:
        """See Way.layer."""
        source, target = self._source, self.pool
        assert source.device_address is not None
        assert target.device_address is not None
        return _Places(
            PoolPlace(source.device_address, source.shape.page_count, source_layer),
            PoolPlace(target.device_address, target.shape.page_count, self._leg.target_layer(source_layer)),
            source.shape.layout,
        )


@dataclass(frozen=True, slots=True)
class _Places:
    """A layer of both pools."""

    source: PoolPlace
    target: PoolPlace
    layout: PageLayout
