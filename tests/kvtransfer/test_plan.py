"""Pieces cover every token of a push once, and none is larger than it may be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.kvtransfer.plan import WHOLE_PAGES, PageTable, Piece, Run, plan_pieces
from services.protocol.ranges import TokenRange

PAGE_SIZE = 4
TOKEN_BYTES = 64
UNBOUNDED = 1 << 30


def plan(part: TokenRange, sources: list[int], targets: list[int], max_bytes: int) -> tuple[Piece, ...]:
    """Between equal page sizes."""
    tables = PageTable(tuple(sources), PAGE_SIZE), PageTable(tuple(targets), PAGE_SIZE)
    return plan_pieces(part, *tables, TOKEN_BYTES, max_bytes)


@settings(max_examples=300, deadline=None)
@given(
    begin=st.integers(0, 30),
    length=st.integers(1, 40),
    sources=st.permutations(range(42)),
    targets=st.permutations(range(42)),
    page_sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    max_bytes=st.integers(1, 12 * TOKEN_BYTES),
    ordered=st.booleans(),
)
def test_every_token_once(
    begin: int,
    length: int,
    sources: list[int],
    targets: list[int],
    page_sizes: tuple[int, int],
    max_bytes: int,
    ordered: bool,
) -> None:
    """From pages of one size to pages of the same or another."""
    part = TokenRange(begin, begin + length)
    if ordered:
        sources, targets = sorted(sources), sorted(targets)
    tables = [
        PageTable(tuple(pages[: len(part.page_indices(size))]), size)
        for pages, size in zip((sources, targets), page_sizes, strict=True)
    ]
    pieces = plan_pieces(part, *tables, TOKEN_BYTES, max_bytes)
    moved = []
    position = part.begin
    for piece in pieces:
        assert piece.part.begin == position
        assert piece.num_bytes == len(piece.part) * TOKEN_BYTES
        assert piece.num_bytes <= max(max_bytes, TOKEN_BYTES)
        position = piece.part.end
        for run in piece.runs:
            moved += zip(
                places(run.source_pages, run.source_tokens, page_sizes[0]),
                places(run.target_pages, run.target_tokens, page_sizes[1]),
                strict=True,
            )
    assert position == part.end
    wanted = [tuple(place(p, part, table) for table in tables) for p in range(part.begin, part.end)]
    assert moved == wanted


def places(pages: slice, tokens: slice, page_size: int) -> list[tuple[int, int]]:
    return [(page, token) for page in range(42)[pages] for token in range(page_size)[tokens]]


def place(position: int, part: TokenRange, table: PageTable) -> tuple[int, int]:
    page, token = divmod(position, table.page_size)
    return table.page_ids[page - part.begin // table.page_size], token


def test_neighbours_are_one_copy() -> None:
    (piece,) = plan(TokenRange(0, 16), [3, 4, 5, 9], [0, 1, 2, 3], UNBOUNDED)
    assert piece.runs == (
        Run(slice(3, 6), WHOLE_PAGES, slice(0, 3), WHOLE_PAGES),
        Run(slice(9, 10), WHOLE_PAGES, slice(3, 4), WHOLE_PAGES),
    )


def test_partial_pages_stand_alone() -> None:
    (piece,) = plan(TokenRange(2, 14), [3, 4, 5, 6], [0, 1, 2, 3], UNBOUNDED)
    assert piece.runs == (
        Run(slice(3, 4), slice(2, 4), slice(0, 1), slice(2, 4)),
        Run(slice(4, 6), WHOLE_PAGES, slice(1, 3), WHOLE_PAGES),
        Run(slice(6, 7), slice(0, 2), slice(3, 4), slice(0, 2)),
    )


def test_a_page_larger_than_a_copy_is_cut() -> None:
    pieces = plan(TokenRange(0, 4), [3], [5], 2 * TOKEN_BYTES)
    halves = [slice(0, 2), slice(2, 4)]
    assert [piece.runs for piece in pieces] == [(Run(slice(3, 4), half, slice(5, 6), half),) for half in halves]


def test_pieces_are_even() -> None:
    pages = list(range(16))
    pieces = plan(TokenRange(0, 16 * PAGE_SIZE), pages, pages, 5 * PAGE_SIZE * TOKEN_BYTES + 1)
    assert [len(piece.part) // PAGE_SIZE for piece in pieces] == [4, 4, 4, 4]
    assert [run.source_pages for piece in pieces for run in piece.runs] == [slice(i, i + 4) for i in range(0, 16, 4)]
