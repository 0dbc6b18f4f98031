"""Which bytes of a layer move for a range of tokens: runs of pages, cut into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages on both sides, moved by one copy. `tokens` of each page; None: the whole page.

    Slices, because they are used once a layer and made once a push.
    """

    source_pages: slice
    target_pages: slice
    tokens: slice | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Runs that are copied under one check. `part` are the positions they hold."""

    part: TokenRange
    runs: tuple[Run, ...]
    num_bytes: int


def plan_pieces(
    part: TokenRange,
    source_page_ids: Sequence[int],
    target_page_ids: Sequence[int],
    layout: PageLayout,
    max_bytes: int,
) -> tuple[Piece, ...]:
    """Cuts a layer's share of a non-empty `part` into pieces of at most `max_bytes`, or of one token if that is more.

    Pages are in token order, the first one holding part.begin, on both sides.
    """
    token_bytes = layout.layer_page_bytes // layout.page_size
    pieces: list[Piece] = []
    runs: list[Run] = []
    begin = position = part.begin
    for run, tokens in _runs(
        part, source_page_ids, target_page_ids, layout.page_size, max(1, max_bytes // token_bytes)
    ):
        if runs and (position + tokens - begin) * token_bytes > max_bytes:
            pieces.append(_piece(begin, position, runs, token_bytes))
            runs, begin = [], position
        if runs and _continues(runs[-1], run):
            last = runs.pop()
            run = Run(
                slice(last.source_pages.start, run.source_pages.stop),
                slice(last.target_pages.start, run.target_pages.stop),
            )
        runs.append(run)
        position += tokens
    pieces.append(_piece(begin, position, runs, token_bytes))
    return tuple(pieces)


def _runs(
    part: TokenRange, sources: Sequence[int], targets: Sequence[int], page_size: int, max_tokens: int
) -> Iterator[tuple[Run, int]]:
    """One run a page, or several if a page is larger than a piece may be; and the number of its tokens."""
    for index, source, target in zip(part.page_indices(page_size), sources, targets, strict=True):
        end = min(part.end - index * page_size, page_size)
        for first in range(max(part.begin - index * page_size, 0), end, max_tokens):
            stop = min(first + max_tokens, end)
            tokens = None if stop - first == page_size else slice(first, stop)
            yield Run(slice(source, source + 1), slice(target, target + 1), tokens), stop - first


def _continues(last: Run, run: Run) -> bool:
    """Whether `run` is the whole page after `last`, which is whole as well."""
    return (
        last.tokens is None
        and run.tokens is None
        and run.source_pages.start == last.source_pages.stop
        and run.target_pages.start == last.target_pages.stop
    )


def _piece(begin: int, end: int, runs: list[Run], token_bytes: int) -> Piece:
    return Piece(TokenRange(begin, end), tuple(runs), (end - begin) * token_bytes)
