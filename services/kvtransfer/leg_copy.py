"""Copies from a sender's pool to a receiver's, both mapped: as stored where both agree, otherwise axis by axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.conversion import CanonicalPages, LayerView, canonical_bytes, layer_view
from services.kvtransfer.landing import LandingShard
from services.kvtransfer.plan import PageTable, Piece, Run, plan_pieces
from services.kvtransfer.pool import Pool
from services.protocol.extents import Leg
from services.protocol.ranges import TokenRange

# Into the pages of a layer. One page by its number: numpy is quicker with that than with a slice.
PageIndex: TypeAlias = "int | slice"


@dataclass(frozen=True, slots=True)
class SourceTokens:
    """Tokens of a sender and the pages that hold them, in token order."""

    pool: Pool
    page_ids: tuple[int, ...]
    part: TokenRange


class LegCopy:
    """What goes from the sender's pool to one of the receiver's, and how."""

    def __init__(self, tokens: SourceTokens, shard: LandingShard, leg: Leg, max_bytes: int) -> None:
        self.pool = shard.pool
        self.layers = leg.source_layers
        self._leg = leg
        self._layouts = source, target = tokens.pool.shape.layout, shard.pool.shape.layout
        self._pages = tokens.pool.pages, shard.pool.pages
        # Alike but for the number of layers: pages are copied as they are.
        self._verbatim = replace(source, layer_count=1) == replace(target, layer_count=1) and (
            leg.head_count == source.kv_head_count
        )
        pieces = plan_pieces(
            tokens.part,
            PageTable(tokens.page_ids, source.page_size),
            PageTable(shard.page_ids, target.page_size),
            canonical_bytes(source, leg.head_count, 1),
            max_bytes,
        )
        self.pieces = tuple(self._prepare(piece) for piece in pieces)
        self._needs_axes = any(piece.runs for piece in self.pieces)

    def layer(self, source_layer: int) -> LayerPair:
        """The pages of one layer on both sides."""
        source, target = self._pages[0][source_layer], self._pages[1][self._leg.target_layer(source_layer)]
        if not self._needs_axes:
            return LayerPair(source, target, None)
        theirs = layer_view(source, self._layouts[0], self._leg.source_heads)
        return LayerPair(source, target, (layer_view(target, self._layouts[1], self._leg.target_heads), theirs))

    def _prepare(self, piece: Piece) -> PieceCopy:
        stored = [run for run in piece.runs if self._verbatim and run.whole]
        pages = tuple((_index(run.target_pages), _index(run.source_pages)) for run in stored)
        return PieceCopy(
            piece.part, piece.num_bytes, pages, tuple(run for run in piece.runs if not (self._verbatim and run.whole))
        )


class PieceCopy(NamedTuple):
    """What is copied under one check: pages as they are stored, target before source, and tokens axis by axis."""

    part: TokenRange
    num_bytes: int
    pages: tuple[tuple[PageIndex, PageIndex], ...]
    runs: tuple[Run, ...]


class LayerPair(NamedTuple):
    """One layer of two pools: as stored, (page_count, layer_page_bytes) each; and in canonical axes, restricted to the
    heads that move, target before source, or None if all that moves is copied as it is stored."""

    stored_source: NDArray[np.uint8]
    stored_target: NDArray[np.uint8]
    axes: tuple[LayerView, LayerView] | None

    def halves(self) -> Iterator[tuple[CanonicalPages, CanonicalPages]]:
        """The keys of both, then the values."""
        assert self.axes is not None
        return zip(*self.axes, strict=True)


def copy_piece(pair: LayerPair, piece: PieceCopy) -> None:
    """Copies a piece of one layer. numpy releases the GIL in each copy, and knows that the two do not overlap."""
    source, target = pair.stored_source, pair.stored_target
    for target_pages, source_pages in piece.pages:
        target[target_pages] = source[source_pages]
    for run in piece.runs:
        for kept, sent in pair.halves():
            kept[run.target_pages, :, run.target_tokens] = sent[run.source_pages, :, run.source_tokens]


def same_piece(pair: LayerPair, piece: PieceCopy) -> bool:
    """Whether both sides hold the same bytes."""
    source, target = pair.stored_source, pair.stored_target
    return all(np.array_equal(target[ours], source[theirs]) for ours, theirs in piece.pages) and all(
        np.array_equal(
            kept[run.target_pages, :, run.target_tokens],
            sent[run.source_pages, :, run.source_tokens],
        )
        for run in piece.runs
        for kept, sent in pair.halves()
    )


def _index(pages: slice) -> PageIndex:
    return int(pages.start) if pages.stop - pages.start == 1 else pages
