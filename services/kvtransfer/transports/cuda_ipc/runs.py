"""Lists of runs of bytes that are copied together, as offsets behind two addresses: made once, used for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.leg_copy import PieceCopy
from services.kvtransfer.plan import Run, spans
from services.protocol.layout import PageLayout

# What one block of the kernel copies: 256 threads, four times sixteen bytes each. A multiple of sixteen, so that tiles
# lie as their run does.
TILE_BYTES = 16 << 10

Rows = NDArray[np.int64]  # (row_count, 3): offset behind the target, offset behind the source, bytes


@dataclass(frozen=True, slots=True)
class RunList:
    """Runs, for one call of the driver each, and the same bytes in tiles, for one launch of the kernel."""

    runs: Rows
    tiles: Rows

    @classmethod
    def of(cls, runs: Rows | Sequence[tuple[int, int, int]]) -> RunList:
        """(offset behind the target, offset behind the source, bytes) each."""
        rows = np.asarray(runs, np.int64).reshape(-1, 3)
        return cls(rows, _tiles(rows))

    @property
    def num_bytes(self) -> int:
        """Of all runs."""
        return int(self.runs[:, 2].sum())

    def targets(self, base: int) -> list[tuple[int, int]]:
        """(address, bytes) of what is written, in order, behind a target at `base`."""
        return [(base + offset, num_bytes) for offset, _, num_bytes in self.runs.tolist()]

    def sources(self, base: int) -> list[tuple[int, int]]:
        """(address, bytes) of what is read, in order, behind a source at `base`."""
        return [(base + offset, num_bytes) for _, offset, num_bytes in self.runs.tolist()]


def piece_runs(piece: PieceCopy, layout: PageLayout, source_page_count: int, target_page_count: int) -> RunList:
    """A piece of what goes from a layer of one pool to a layer of another, whose pages are arranged alike; behind the
    beginnings of the layers."""
    rows = []
    for run in piece.runs:
        sources = spans(0, run.source_pages, run.source_tokens, layout, source_page_count)
        targets = spans(0, run.target_pages, run.target_tokens, layout, target_page_count)
        for (source, num_bytes), (target, _) in zip(sources, targets, strict=True):
            rows.append((target, source, num_bytes))
    pages = piece.pages[:, [1, 0, 2]] * layout.layer_page_bytes
    return RunList.of(np.concatenate((pages, np.array(rows, np.int64).reshape(-1, 3))))


def scatter_runs(layer: int, runs: Sequence[Run], layout: PageLayout, page_count: int) -> RunList:
    """From a buffer, filled in the order of byte_ranges_of, to the target side of `runs` in a pool; behind both."""
    rows, source = [], 0
    for run in runs:
        for target, num_bytes in spans(layer, run.target_pages, run.target_tokens, layout, page_count):
            rows.append((target, source, num_bytes))
            source += num_bytes
    return RunList.of(rows)


def _tiles(runs: Rows) -> Rows:
    counts = -(-runs[:, 2] // TILE_BYTES)
    tiles = np.repeat(runs, counts, axis=0)
    of_run = np.arange(len(tiles)) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles += of_run[:, None] * (TILE_BYTES, TILE_BYTES, -TILE_BYTES)
    tiles[:, 2] = np.minimum(tiles[:, 2], TILE_BYTES)
    return tiles
