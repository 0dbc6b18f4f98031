"""A receiver's address for KV, as plain data; types.v1.KvAddress is its form on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.protocol.extents import Extent
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class KvShard:
    """Some layers and heads of a receiver's pool and the pages in it, in token order."""

    pool_id: str
    layers: tuple[int, int]
    kv_heads: tuple[int, int]
    page_ids: tuple[int, ...]

    @property
    def extent(self) -> Extent:
        """Its layers and heads. Raises LayoutMismatch if there are none."""
        return Extent(self.layers, self.kv_heads)


@dataclass(frozen=True, slots=True)
class KvAddress:
    """Where to write and the right to do so. The secret is left out of repr, so that it reaches no log.

    `layout` is that of a pool with the whole model; a shard's pool has the same with its own layers and heads.
    """

    reservation_id: str
    endpoint: str
    epoch: bytes
    secret: bytes = field(repr=False)
    window: TokenRange
    shards: tuple[KvShard, ...]
    layout: PageLayout
    model_digest: bytes
    prompt_digest: bytes

    @property
    def whole(self) -> Extent:
        """All layers and heads of the receiver's model."""
        return Extent((0, self.layout.layer_count), (0, self.layout.kv_head_count))
