"""Copies from a sender's pool to a receiver's, both mapped: as stored where both agree, otherwise axis by axis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.conversion import LayerView, canonical_bytes, layer_view
from services.kvtransfer.landing import LandingShard
from services.kvtransfer.plan import PageTable, Run, plan_pieces
from services.kvtransfer.pool import Pool
from services.protocol.extents import Leg
from services.protocol.ranges import TokenRange


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
        self.pieces = plan_pieces(
            tokens.part,
            PageTable(tokens.page_ids, source.page_size),
            PageTable(shard.page_ids, target.page_size),
            canonical_bytes(source, leg.head_count, 1),
            max_bytes,
        )

    def layer(self, source_layer: int) -> LayerPair:
        """The pages of one layer on both sides."""
        source, target = self._pages[0][source_layer], self._pages[1][self._leg.target_layer(source_layer)]
        return LayerPair(
            (source, target) if self._verbatim else None,
            layer_view(source, self._layouts[0], self._leg.source_heads),
            layer_view(target, self._layouts[1], self._leg.target_heads),
        )


class LayerPair(NamedTuple):
    """One layer of two pools: as stored, (page_count, layer_page_bytes) each, if both store it alike; and in canonical
    axes, restricted to the heads that move."""

    stored: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None
    source: LayerView
    target: LayerView


def copy_runs(pair: LayerPair, runs: tuple[Run, ...]) -> None:
    """Copies tokens of a layer. numpy releases the GIL in each copy, and knows that the two do not overlap."""
    for run in runs:
        if pair.stored is not None and run.whole:
            source, target = pair.stored
            target[run.target_pages] = source[run.source_pages]
        else:
            for kept, sent in zip(pair.target, pair.source, strict=True):
                kept[run.target_pages, :, run.target_tokens] = sent[run.source_pages, :, run.source_tokens]
