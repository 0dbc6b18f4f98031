"""Pages of any layout, seen in the one canonical order (layer, k|v, head, token, element), and copies between them.

numpy only. A strided copy releases the interpreter lock, so threads convert at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange

# Keys or values of one layer, whatever the order they are stored in: (page, head, token, element).
CanonicalPages: TypeAlias = NDArray[Any]


class Place(NamedTuple):
    """Tokens of one page. Positions in the page, not in the prompt."""

    page_id: int
    tokens: slice


class LayerView(NamedTuple):
    """Some heads of one layer of a pool, in canonical axes. Writing into it writes into the pool."""

    keys: CanonicalPages
    values: CanonicalPages


def layer_view(pages: NDArray[np.uint8], layout: PageLayout, heads: slice = slice(None)) -> LayerView:
    """`pages` (page_count, layer_page_bytes) of one layer of a pool. `heads` counts from the pool's first one."""
    elements = pages.view(np.dtype(f"u{layout.dtype.size_bytes}")).reshape(len(pages), 2, -1)
    sizes = (layout.kv_head_count, layout.page_size, layout.head_dim)
    views = []
    for half, axes in enumerate(layout.order.axes):
        stored = elements[:, half].reshape(len(pages), *(sizes[axis] for axis in axes))
        views.append(stored.transpose(0, *(1 + axes.index(axis) for axis in range(3)))[:, heads])
    return LayerView(*views)


def places(part: TokenRange, page_ids: Sequence[int], page_size: int) -> Iterator[Place]:
    """Where the tokens of `part` are, page by page; the first page holds part.begin."""
    for index, page_id in zip(part.page_indices(page_size), page_ids, strict=True):
        first = index * page_size
        yield Place(page_id, slice(max(part.begin - first, 0), min(part.end - first, page_size)))


def canonical_bytes(layout: PageLayout, head_count: int, token_count: int) -> int:
    """Bytes of so many heads and tokens of one layer: what gather fills and scatter reads."""
    return 2 * head_count * token_count * layout.token_bytes


def gather(view: LayerView, part: TokenRange, page_ids: Sequence[int], buffer: NDArray[np.uint8]) -> None:
    """Fills `buffer` with the tokens of `part` in canonical order.

    `buffer` is contiguous and has canonical_bytes; `page_ids` hold `part`, in token order.
    """
    for whole, tokens, pages, place in _windows(view, part, page_ids, buffer):
        whole[:, tokens] = pages[place.page_id, :, place.tokens]


def scatter(view: LayerView, part: TokenRange, page_ids: Sequence[int], buffer: NDArray[np.uint8]) -> None:
    """The other way round: puts what gather made of `part` into `page_ids` of a pool of any layout."""
    for whole, tokens, pages, place in _windows(view, part, page_ids, buffer):
        pages[place.page_id, :, place.tokens] = whole[:, tokens]


def _windows(
    view: LayerView, part: TokenRange, page_ids: Sequence[int], buffer: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[Any], slice, CanonicalPages, Place]]:
    """Each place of `part` in keys and in values, beside its tokens in the buffer."""
    _, head_count, page_size, head_dim = view.keys.shape
    halves = buffer.view(view.keys.dtype).reshape(2, head_count, len(part), head_dim)
    begin = 0
    for place in places(part, page_ids, page_size):
        end = begin + place.tokens.stop - place.tokens.start
        for whole, pages in zip(halves, view, strict=True):
            yield whole, slice(begin, end), pages, place
        begin = end
