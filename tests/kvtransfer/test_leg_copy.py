"""The pieces of a layer move every token once, whatever the pages and the bound, and in either way of copying."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.kvtransfer import leg_copy
from services.kvtransfer.landing import LandingShard
from services.kvtransfer.leg_copy import LegCopy, SourceTokens, copy_piece, same_piece
from services.kvtransfer.pool import Pool
from services.kvtransfer.streaming import copy_plainly, page_copier
from services.protocol.extents import Extent, legs
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange

NUM_PAGES = 16
LAYOUT = PageLayout(layer_count=2, kv_head_count=2, head_dim=8, page_size=4, dtype=Dtype.FLOAT32)
PAGE_BYTES = LAYOUT.layer_page_bytes
TOKEN_BYTES = PAGE_BYTES // LAYOUT.page_size


def pool() -> Pool:
    """Memory, and what is known of it."""
    pages = np.zeros((LAYOUT.layer_count, NUM_PAGES, PAGE_BYTES), np.uint8)
    return cast(Pool, SimpleNamespace(pages=pages, shape=SimpleNamespace(layout=LAYOUT)))


def tokens(of: Pool, page_ids: tuple[int, ...], part: TokenRange) -> np.ndarray:
    """Of layer 1, (token, keys and values, head, element)."""
    stored = of.pages[1].view(np.float32).reshape(NUM_PAGES, 2, 2, 4, 8)[list(page_ids)]
    first = part.begin // LAYOUT.page_size * LAYOUT.page_size
    return stored.transpose(0, 3, 1, 2, 4).reshape(-1, 2, 2, 8)[part.begin - first : part.end - first]


@pytest.mark.slow
@pytest.mark.parametrize("copier", [copy_plainly, page_copier()])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    begin=st.integers(0, 9),
    length=st.integers(1, 40),
    sources=st.permutations(range(NUM_PAGES)),
    targets=st.permutations(range(NUM_PAGES)),
    max_bytes=st.integers(1, 8 * PAGE_BYTES),
    ordered=st.booleans(),
)
def test_every_token_once(
    monkeypatch: pytest.MonkeyPatch,
    copier: object,
    begin: int,
    length: int,
    sources: list[int],
    targets: list[int],
    max_bytes: int,
    ordered: bool,
) -> None:
    monkeypatch.setattr(leg_copy, "page_copier", lambda: copier)
    part = TokenRange(begin, begin + length)
    count = len(part.page_indices(LAYOUT.page_size))
    if ordered:
        sources, targets = sorted(sources), sorted(targets)
    source_ids, target_ids = tuple(sources[:count]), tuple(targets[:count])
    sender, receiver = pool(), pool()
    sender.pages[:] = np.random.default_rng(0).integers(1, 100, sender.pages.shape)
    extent = Extent((0, 2), (0, 2))
    (leg,) = legs(extent, [extent])
    copy = LegCopy(SourceTokens(sender, source_ids, part), LandingShard(receiver, target_ids), leg, max_bytes)
    pair = copy.layer(1)
    assert not any(same_piece(pair, piece) for piece in copy.pieces)
    for piece in copy.pieces:
        copy_piece(pair, piece)
        assert same_piece(pair, piece)
        assert piece.num_bytes <= max(max_bytes, TOKEN_BYTES)
        assert part.contains(piece.part)
    assert sum(piece.num_bytes for piece in copy.pieces) == length * TOKEN_BYTES
    np.testing.assert_array_equal(tokens(receiver, target_ids, part), tokens(sender, source_ids, part))
    assert np.count_nonzero(receiver.pages) == length * TOKEN_BYTES
    assert not receiver.pages[0].any()


def test_pages_are_read_in_the_order_of_memory() -> None:
    """Neighbours make one run wherever they are in the prompt, and pieces are even."""
    extent = Extent((0, 2), (0, 2))
    (leg,) = legs(extent, [extent])
    page_ids = (7, 2, 3, 6, 0, 8, 9)
    whole = SourceTokens(pool(), page_ids, TokenRange(0, 28))
    pieces = LegCopy(whole, LandingShard(pool(), page_ids), leg, 4 * PAGE_BYTES).pieces
    assert [piece.pages.tolist() for piece in pieces] == [[[0, 0, 1], [2, 2, 2], [6, 6, 1]], [[7, 7, 3]]]
