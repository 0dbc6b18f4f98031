"""How a pool arranges its pages: (layer, page) to byte offset is arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from services.protocol.errors import LayoutMismatch


class Dtype(Enum):
    """Number format of KV values; the value is its name on the wire without the prefix."""

    FLOAT32 = "FLOAT32"
    FLOAT16 = "FLOAT16"
    BFLOAT16 = "BFLOAT16"
    FLOAT8_E4M3 = "FLOAT8_E4M3"

    @property
    def size_bytes(self) -> int:
        """Bytes of one value."""
        return _SIZE_BYTES[self]


_SIZE_BYTES = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2, Dtype.BFLOAT16: 2, Dtype.FLOAT8_E4M3: 1}


class PageOrder(Enum):
    """Order of the axes in the part of a page that belongs to one layer; see types.v1.PageOrder."""

    KV_HEAD_TOKEN_DIM = "KV_HEAD_TOKEN_DIM"
    KV_TOKEN_HEAD_DIM = "KV_TOKEN_HEAD_DIM"
    K_HEAD_DIM_TOKEN = "K_HEAD_DIM_TOKEN"

    @property
    def axes(self) -> tuple[Axes, Axes]:
        """How keys are stored, and after them values: 0 is head, 1 token, 2 element; outermost first."""
        return _AXES[self]


Axes: TypeAlias = tuple[int, int, int]

_HEAD_TOKEN_DIM, _TOKEN_HEAD_DIM, _HEAD_DIM_TOKEN = (0, 1, 2), (1, 0, 2), (0, 2, 1)
_AXES: dict[PageOrder, tuple[Axes, Axes]] = {
    PageOrder.KV_HEAD_TOKEN_DIM: (_HEAD_TOKEN_DIM, _HEAD_TOKEN_DIM),
    PageOrder.KV_TOKEN_HEAD_DIM: (_TOKEN_HEAD_DIM, _TOKEN_HEAD_DIM),
    PageOrder.K_HEAD_DIM_TOKEN: (_HEAD_DIM_TOKEN, _HEAD_TOKEN_DIM),
}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """A pool is `layer_count` blocks of pages; see types.v1.PageLayout. Raises LayoutMismatch if impossible."""

    layer_count: int
    kv_head_count: int
    head_dim: int
    page_size: int
    dtype: Dtype
    order: PageOrder = PageOrder.KV_HEAD_TOKEN_DIM

    def __post_init__(self) -> None:
        if min(self.layer_count, self.kv_head_count, self.head_dim, self.page_size) < 1:
            raise LayoutMismatch("a page layout needs at least one layer, head, element and token")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys, or values, of one head of one layer."""
        return self.head_dim * self.dtype.size_bytes

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of one page of one layer: keys and values of all heads."""
        return 2 * self.kv_head_count * self.page_size * self.token_bytes

    def pool_bytes(self, page_count: int) -> int:
        """Bytes of a pool of `page_count` pages."""
        return self.layer_count * page_count * self.layer_page_bytes

    def offset(self, layer: int, page_id: int, page_count: int) -> int:
        """Byte offset of a page of a layer in a pool of `page_count` pages."""
        return (layer * page_count + page_id) * self.layer_page_bytes
