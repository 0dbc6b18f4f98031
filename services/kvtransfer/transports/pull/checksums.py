"""End-to-end checksums of what one push moves, as both sides compute them of their own pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.plan import PageTable, plan_pieces
from services.kvtransfer.transports.pull.fetching import extents_of
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


def layer_checksums(
    pages: NDArray[np.uint8], layout: PageLayout, page_ids: tuple[int, ...], part: TokenRange
) -> tuple[int, ...]:
    """One a layer, of the tokens of `part` in these pages of a pool, (layer_count, page_count, layer_page_bytes); see
    kvtransfer.v1.PullChecksums. The same on both sides, whatever the page ids. Blocks while it reads."""
    table, page_count = PageTable(page_ids, layout.page_size), pages.shape[1]
    token_bytes, whole_bytes = layout.layer_page_bytes // layout.page_size, layout.layer_page_bytes * len(page_ids)
    (piece,) = plan_pieces(part, table, table, token_bytes, whole_bytes)
    memory = pages.reshape(-1).data

    def of_layer(layer: int) -> int:
        extents = extents_of(layer, piece.runs, layout, page_count)
        return checksum_of(memory[each.offset : each.offset + each.num_bytes] for each in extents)

    return tuple(of_layer(layer) for layer in range(layout.layer_count))
