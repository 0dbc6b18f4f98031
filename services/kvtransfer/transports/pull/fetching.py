"""What a way of fetching bytes from a sender's pool has to offer; transports/pull/puller.py does everything else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.plan import Run
from services.kvtransfer.pool import Pool
from services.protocol.layout import PageLayout


@dataclass(frozen=True, slots=True)
class SourcePool:
    """The sender's pool as the receiver knows it. `offer` is what SourceSide.offer made."""

    layout: PageLayout
    page_count: int
    offer: bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a pool: offset and length."""

    offset: int
    num_bytes: int


class Fetcher(Protocol):
    """Fetches out of one source pool."""

    def fetch(self, extents: Sequence[Extent]) -> AbstractAsyncContextManager[NDArray[np.uint8]]:
        """Inside, the extents of the source pool, one after the other, in a buffer of the receiving service.

        Raises PeerLost. Cancelling leaves a buffer that nobody else gets before it is written no more.
        """


class SinkSide(Protocol):
    """The receiving end of a transport that pulls."""

    @property
    def name(self) -> str:
        """The transport's."""

    @property
    def buffer_bytes(self) -> int:
        """The most that one fetch may bring."""

    def connect(self, source: SourcePool) -> AbstractAsyncContextManager[Fetcher]:
        """Inside, the source can be fetched from. Raises TransportFailed."""


class SourceSide(Protocol):
    """The sending end of a transport that pulls."""

    @property
    def name(self) -> str:
        """The transport's."""

    def serve(self, pool: Pool) -> AbstractAsyncContextManager[bytes]:
        """Inside, the pool can be fetched from by whoever has the offer given. Raises TransportFailed."""


def extents_of(layer: int, runs: Sequence[Run], layout: PageLayout, page_count: int) -> list[Extent]:
    """Where the source side of a piece lies in its pool, in the order in which `place` takes the bytes."""
    extents = []
    for run in runs:
        begin = layout.offset(layer, run.source_pages.start, page_count)
        num_pages = run.source_pages.stop - run.source_pages.start
        if run.whole:
            extents.append(Extent(begin, num_pages * layout.layer_page_bytes))
            continue
        # One extent for keys and one for values of each head.
        head_bytes = layout.page_size * layout.token_bytes
        first, num_tokens = run.source_tokens.start, run.source_tokens.stop - run.source_tokens.start
        for head in range(2 * layout.kv_head_count):
            offset = begin + head * head_bytes + first * layout.token_bytes
            extents.append(Extent(offset, num_tokens * layout.token_bytes))
    return extents


def place(data: NDArray[np.uint8], pages: NDArray[np.uint8], runs: Sequence[Run], layout: PageLayout) -> None:
    """Copies fetched bytes, (num_bytes,), to the target side of a piece; `pages` (page_count, layer_page_bytes)."""
    tokens = pages.reshape(-1, 2 * layout.kv_head_count, layout.page_size, layout.token_bytes)
    begin = 0
    for run in runs:
        target = pages[run.target_pages] if run.whole else tokens[run.target_pages, :, run.target_tokens]
        target[...] = data[begin : begin + target.size].reshape(target.shape)
        begin += target.size
