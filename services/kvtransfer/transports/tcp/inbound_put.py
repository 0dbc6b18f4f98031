"""One put as its receiver sees it: which frame comes next, and which pages of which pools its bytes belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.conversion import canonical_bytes
from services.kvtransfer.errors import ChecksumMismatch, ProtocolViolation
from services.kvtransfer.landing import Landing
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.tcp.frames import PutPages
from services.kvtransfer.transports.tcp.wire import Header
from services.protocol.errors import ServiceError
from services.protocol.extents import Leg
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


class _Way(NamedTuple):
    """What goes to one of the receiver's pools."""

    leg: Leg
    pool: Pool
    pages: PutPages

    def write(self, layer: int, frame: TokenRange, halves: NDArray[np.uint8]) -> int:
        """Puts its share of a frame, (keys and values, head, bytes), into its pages."""
        mine = np.ascontiguousarray(halves[:, self.leg.source_heads]).reshape(-1)
        self.pages.scatter(self.leg.target_layer(layer), frame, mine)
        return len(mine)


class InboundPut:
    """Belongs to the connection's thread, once it is open."""

    def __init__(self, number: int, landing: Landing, source: PageLayout, *, checksum: bool) -> None:
        """`source`: how the sender arranges its pages."""
        self.number = number
        self.landing = landing
        self.checksum = checksum
        self.failure: ServiceError | None = None
        self.listening = ExitStack()
        self._source = source
        self._ways = [self._way(leg) for leg in landing.legs]
        self._layer = 0
        self._begin = landing.part.begin
        first = self._ways[0]
        # Alike but for the number of layers.
        self.verbatim = (
            len(self._ways) == 1
            and replace(source, layer_count=1) == replace(first.pages.layout, layer_count=1)
            and first.leg.head_count == source.kv_head_count
        )

    @property
    def complete(self) -> bool:
        """Whether every frame has come."""
        return self._layer == self._source.layer_count

    def take(self, header: Header) -> TokenRange:
        """The tokens of the next frame. Raises ProtocolViolation if it is another than the next."""
        part = self.landing.part
        if self.complete or (header.layer, header.begin) != (self._layer, self._begin):
            raise ProtocolViolation("a frame out of order")
        if not header.begin < header.end <= part.end:
            raise ProtocolViolation("a frame outside its put")
        if header.length != canonical_bytes(self._source, self._source.kv_head_count, header.end - header.begin):
            raise ProtocolViolation("a frame whose length is not that of its tokens")
        self._begin = header.end
        if header.end == part.end:
            self._layer, self._begin = self._layer + 1, part.begin
        return TokenRange(header.begin, header.end)

    def pages_in_place(self, layer: int, frame: TokenRange) -> tuple[Pool, list[memoryview]] | None:
        """The memory that the frame's bytes can be read straight into; None: they must be scattered."""
        (way, *_) = self._ways
        if not self.verbatim or not way.pages.holds_whole(frame):
            return None
        return way.pool, way.pages.views(way.leg.target_layer(layer), frame)

    def writes(
        self, layer: int, frame: TokenRange, buffer: NDArray[np.uint8]
    ) -> Iterator[tuple[Pool, Callable[[], int]]]:
        """What puts a frame in canonical order into pages: one call a pool, which returns the bytes it wrote."""
        halves = buffer.reshape(2, self._source.kv_head_count, -1)
        for way in self._ways:
            if layer in way.leg.source_layers:
                yield way.pool, partial(way.write, layer, frame, halves)

    def check(self, header: Header, views: list[memoryview]) -> int:
        """Raises ChecksumMismatch unless these are the bytes that were sent. Writes nothing: 0 bytes."""
        if self.checksum and checksum_of(views) != header.checksum:
            raise ChecksumMismatch(f"layer {header.layer}, tokens [{header.begin}, {header.end})")
        return 0

    def close(self) -> None:
        """Lets go of the pools."""
        for way in self._ways:
            way.pages.close()

    def _way(self, leg: Leg) -> _Way:
        shard = self.landing.shards[leg.target_index]
        return _Way(leg, shard.pool, PutPages(shard.pool, self.landing.part, shard.page_ids, leg.target_heads))
