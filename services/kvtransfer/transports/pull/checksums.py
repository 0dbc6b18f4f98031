"""End-to-end checksums of what one push moves, as both sides compute them of their own pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.plan import PageTable, plan_pieces
from services.kvtransfer.pool import Pool
from services.kvtransfer.transports.pull.fetching import ByteRange, byte_ranges_of
from services.protocol.ranges import TokenRange

# See SinkSide.checksum.
Checksum = Callable[[Pool, Sequence[ByteRange]], int]


def layer_checksums(checksum: Checksum, pool: Pool, page_ids: tuple[int, ...], part: TokenRange) -> Iterator[int]:
    """One a layer, of the tokens of `part` in these pages of a pool; see kvtransfer.v1.PullChecksums. The same on both
    sides, whatever the page ids. A layer is read when its checksum is asked for, which blocks meanwhile; raises what
    `checksum` raises."""
    layout, page_count = pool.shape.layout, pool.shape.page_count
    table = PageTable(page_ids, layout.page_size)
    token_bytes, whole_bytes = layout.layer_page_bytes // layout.page_size, layout.layer_page_bytes * len(page_ids)
    (piece,) = plan_pieces(part, table, table, token_bytes, whole_bytes)
    for layer in range(layout.layer_count):
        yield checksum(pool, byte_ranges_of(layer, piece.runs, layout, page_count))


def host_checksum(pool: Pool, ranges: Sequence[ByteRange]) -> int:
    """A Checksum of pools in host memory."""
    memory = pool.pages.reshape(-1).data
    return checksum_of(memory[each.offset : each.offset + each.num_bytes] for each in ranges)
