"""Copies from a sender's pool to a receiver's, both mapped: as stored where both agree, otherwise axis by axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.conversion import CanonicalPages, LayerView, canonical_bytes, layer_view
from services.kvtransfer.landing import LandingShard
from services.kvtransfer.plan import PageTable, Piece, Run, plan_pages, plan_pieces
from services.kvtransfer.pool import Pool
from services.kvtransfer.streaming import PageRuns, page_copier
from services.protocol.extents import Leg
from services.protocol.ranges import TokenRange

# Fewer pages than this in a piece are left to plan_pieces: the first and the last page of a push may be parts of pages.
_MIN_PAGES_A_PIECE = 3


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
        self._token_bytes = canonical_bytes(source, leg.head_count, 1)
        tables = PageTable(tokens.page_ids, source.page_size), PageTable(shard.page_ids, target.page_size)
        self.pieces = plan_copies(tokens.part, *tables, self._token_bytes, max_bytes, verbatim=self._verbatim)
        self._needs_axes = any(piece.runs for piece in self.pieces)

    def layer(self, source_layer: int) -> LayerPair:
        """The pages of one layer on both sides."""
        source, target = self._pages[0][source_layer], self._pages[1][self._leg.target_layer(source_layer)]
        if not self._needs_axes:
            return LayerPair(source, target, None)
        theirs = layer_view(source, self._layouts[0], self._leg.source_heads)
        return LayerPair(source, target, (layer_view(target, self._layouts[1], self._leg.target_heads), theirs))


class PieceCopy(NamedTuple):
    """What is copied under one check, somewhere in `part`: pages as they are stored, and tokens axis by axis."""

    part: TokenRange
    num_bytes: int
    pages: PageRuns
    runs: tuple[Run, ...]


def plan_copies(
    part: TokenRange, source: PageTable, target: PageTable, token_bytes: int, max_bytes: int, *, verbatim: bool
) -> list[PieceCopy]:
    """As few pieces of at most `max_bytes`, as even, as whole pages allow; parts of pages, at most two, are in the
    first one. `verbatim`: whole pages are copied as they are stored, in the order of the source."""
    page_size, num_pages = source.page_size, len(source.page_ids)
    page_bytes = page_size * token_bytes
    max_pages = max_bytes // page_bytes
    cut_first, cut_last = part.begin % page_size, part.end % page_size
    whole = slice(1 if cut_first else 0, num_pages - 1 if cut_last else num_pages)
    if not verbatim or max_pages < _MIN_PAGES_A_PIECE or whole.start >= whole.stop:
        pieces = plan_pieces(part, source, target, token_bytes, max_bytes)
        return [_piece_copy(piece, verbatim=verbatim) for piece in pieces]
    parts: list[Piece] = []
    if cut_first:
        begin = TokenRange(part.begin, part.begin - cut_first + page_size)
        parts += plan_pieces(begin, source[:1], target[:1], token_bytes, max_bytes)
    if cut_last:
        end = TokenRange(part.end - cut_last, part.end)
        parts += plan_pieces(end, source[-1:], target[-1:], token_bytes, max_bytes)
    even_pages = -(-num_pages // -(-num_pages // max_pages))
    pages = plan_pages(source[whole], target[whole], even_pages - len(parts), even_pages)
    copies = [PieceCopy(part, int(runs[:, 2].sum()) * page_bytes, runs, ()) for runs in pages]
    num_bytes = copies[0].num_bytes + sum(piece.num_bytes for piece in parts)
    copies[0] = PieceCopy(part, num_bytes, copies[0].pages, tuple(run for piece in parts for run in piece.runs))
    return copies


def _piece_copy(piece: Piece, *, verbatim: bool) -> PieceCopy:
    stored = [run for run in piece.runs if verbatim and run.whole]
    pages = [(run.source_pages.start, run.target_pages.start, run.page_count) for run in stored]
    others = tuple(run for run in piece.runs if not (verbatim and run.whole))
    return PieceCopy(piece.part, piece.num_bytes, np.array(pages, np.int64).reshape(-1, 3), others)


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
    """Copies a piece of one layer. The interpreter lock is free meanwhile; the two do not overlap."""
    page_copier()(pair.stored_source, pair.stored_target, piece.pages)
    for run in piece.runs:
        for kept, sent in pair.halves():
            kept[run.target_pages, :, run.target_tokens] = sent[run.source_pages, :, run.source_tokens]


def same_piece(pair: LayerPair, piece: PieceCopy) -> bool:
    """Whether both sides hold the same bytes."""
    source, target = pair.stored_source, pair.stored_target
    return all(
        np.array_equal(target[to_page : to_page + count], source[from_page : from_page + count])
        for from_page, to_page, count in piece.pages.tolist()
    ) and all(
        np.array_equal(
            kept[run.target_pages, :, run.target_tokens],
            sent[run.source_pages, :, run.source_tokens],
        )
        for run in piece.runs
        for kept, sent in pair.halves()
    )
