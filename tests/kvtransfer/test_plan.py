"""Pieces cover every token of a push once, and none is larger than it may be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvtransfer.plan import Run, plan_pieces
from services.protocol.layout import Dtype, PageLayout
from services.protocol.ranges import TokenRange

PAGE_SIZE = 4
LAYOUT = PageLayout(layer_count=1, kv_head_count=2, head_dim=4, page_size=PAGE_SIZE, dtype=Dtype.FLOAT32)
TOKEN_BYTES = LAYOUT.layer_page_bytes // PAGE_SIZE
UNBOUNDED = 1 << 30


@settings(max_examples=200, deadline=None)
@given(
    begin=st.integers(0, 30),
    length=st.integers(1, 40),
    sources=st.permutations(range(20)),
    targets=st.permutations(range(20)),
    max_bytes=st.integers(1, 12 * TOKEN_BYTES),
    ordered=st.booleans(),
)
def test_every_token_once(
    begin: int, length: int, sources: list[int], targets: list[int], max_bytes: int, ordered: bool
) -> None:
    part = TokenRange(begin, begin + length)
    if ordered:
        sources, targets = sorted(sources), sorted(targets)
    count = len(part.page_indices(PAGE_SIZE))
    pieces = plan_pieces(part, sources[:count], targets[:count], LAYOUT, max_bytes)
    moved = []
    position = part.begin
    for piece in pieces:
        assert piece.part.begin == position
        assert piece.num_bytes == len(piece.part) * TOKEN_BYTES
        assert piece.num_bytes <= max(max_bytes, TOKEN_BYTES)
        position = piece.part.end
        for run in piece.runs:
            from_pages, to_pages = (range(20)[pages] for pages in (run.source_pages, run.target_pages))
            tokens = range(PAGE_SIZE)[run.tokens or slice(None)]
            moved += [((a, token), (b, token)) for a, b in zip(from_pages, to_pages, strict=True) for token in tokens]
    assert position == part.end
    first = part.begin // PAGE_SIZE
    wanted = [
        ((sources[p // PAGE_SIZE - first], p % PAGE_SIZE), (targets[p // PAGE_SIZE - first], p % PAGE_SIZE))
        for p in range(part.begin, part.end)
    ]
    assert moved == wanted


def test_neighbours_are_one_copy() -> None:
    (piece,) = plan_pieces(TokenRange(0, 16), [3, 4, 5, 9], [0, 1, 2, 3], LAYOUT, UNBOUNDED)
    assert piece.runs == (Run(slice(3, 6), slice(0, 3)), Run(slice(9, 10), slice(3, 4)))


def test_partial_pages_stand_alone() -> None:
    (piece,) = plan_pieces(TokenRange(2, 14), [3, 4, 5, 6], [0, 1, 2, 3], LAYOUT, UNBOUNDED)
    assert piece.runs == (
        Run(slice(3, 4), slice(0, 1), slice(2, 4)),
        Run(slice(4, 6), slice(1, 3)),
        Run(slice(6, 7), slice(3, 4), slice(0, 2)),
    )


def test_a_page_larger_than_a_copy_is_cut() -> None:
    pieces = plan_pieces(TokenRange(0, 4), [3], [5], LAYOUT, 2 * TOKEN_BYTES)
    one_page = (slice(3, 4), slice(5, 6))
    assert [piece.runs for piece in pieces] == [(Run(*one_page, slice(0, 2)),), (Run(*one_page, slice(2, 4)),)]
