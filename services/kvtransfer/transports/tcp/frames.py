"""Which frames a put is cut into, and where the bytes of each lie in a pool."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.conversion import canonical_bytes, gather, layer_view, scatter
from services.kvtransfer.pool import Pool
from services.protocol.ranges import TokenRange


def cut(part: TokenRange, page_size: int, token_bytes: int, max_bytes: int, *, verbatim: bool) -> Iterator[TokenRange]:
    """A layer's share of a put as frames of at most `max_bytes`, or of one token if that is more. `verbatim`: whole
    pages travel as they are, so they do not share a frame with parts of pages."""
    most = max(1, max_bytes // token_bytes)
    begin = part.begin
    while begin < part.end:
        end = min(begin + most, part.end)
        if verbatim and begin % page_size:
            end = min(end, begin - begin % page_size + page_size)
        elif verbatim and end - begin >= page_size:
            end -= end % page_size
        yield TokenRange(begin, end)
        begin = end


class PutPages:
    """The pages of one put on one side. Views of it keep the pool mapped: `close` when the put is over."""

    def __init__(self, pool: Pool, part: TokenRange, page_ids: tuple[int, ...], heads: slice = slice(None)) -> None:
        """`page_ids` hold `part`, in token order. `heads`: which ones gather and scatter mean."""
        assert pool.memory is not None
        self.layout = pool.shape.layout
        self._heads = heads
        self._head_count = len(range(*heads.indices(self.layout.kv_head_count)))
        self._page_count = pool.shape.page_count
        self._page_ids = page_ids
        self._first_page = part.begin // self.layout.page_size
        self._pages = pool.pages
        self._bytes = self._pages.reshape(-1).data

    def close(self) -> None:
        """Lets go of the pool."""
        self._pages = np.empty((0, 0, 0), np.uint8)
        self._bytes = memoryview(b"")

    def holds_whole(self, frame: TokenRange) -> bool:
        """Whether these are whole pages, so that they may travel as they are."""
        return not (frame.begin % self.layout.page_size or frame.end % self.layout.page_size)

    def views(self, layer: int, frame: TokenRange) -> list[memoryview]:
        """The memory of whole pages of a layer, neighbours in one view."""
        size = self.layout.layer_page_bytes
        views = []
        for _, run in groupby(enumerate(self._ids(frame)), key=lambda item: item[1] - item[0]):
            page_ids = [page_id for _, page_id in run]
            begin = self.layout.offset(layer, page_ids[0], self._page_count)
            views.append(self._bytes[begin : begin + len(page_ids) * size])
        return views

    def gather(self, layer: int, frame: TokenRange) -> NDArray[np.uint8]:
        """A copy in canonical order."""
        buffer = np.empty(canonical_bytes(self.layout, self._head_count, len(frame)), np.uint8)
        gather(layer_view(self._pages[layer], self.layout, self._heads), frame, self._ids(frame), buffer)
        return buffer

    def scatter(self, layer: int, frame: TokenRange, buffer: NDArray[np.uint8]) -> None:
        """The inverse of gather."""
        scatter(layer_view(self._pages[layer], self.layout, self._heads), frame, self._ids(frame), buffer)

    def _ids(self, frame: TokenRange) -> tuple[int, ...]:
        indices = frame.page_indices(self.layout.page_size)
        return self._page_ids[indices.start - self._first_page : indices.stop - self._first_page]
