"""Which tokens of a layer move from which pages to which: runs of pages, cut into pieces of bounded size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.kvtransfer.streaming import PageRuns
from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange

WHOLE_PAGES = slice(None)


@dataclass(frozen=True, slots=True)
class PageTable:
    """Pages in token order, the first one holding the first token of what is planned."""

    page_ids: tuple[int, ...]
    page_size: int

    def __getitem__(self, pages: slice) -> PageTable:
        """Some of the pages, by their place in the table."""
        return PageTable(self.page_ids[pages], self.page_size)


@dataclass(frozen=True, slots=True)
class Run:
    """Moved by one copy: the same tokens of neighbouring pages, or some of one page. WHOLE_PAGES if all of them.

    Slices, because they are used once a layer and made once a push.
    """

    source_pages: slice
    source_tokens: slice
    target_pages: slice
    target_tokens: slice

    @property
    def page_count(self) -> int:
        """Pages on either side that it touches."""
        return int(self.source_pages.stop - self.source_pages.start)

    @property
    def whole(self) -> bool:
        """Whether it moves whole pages to whole pages."""
        return self.source_tokens == self.target_tokens == WHOLE_PAGES


@dataclass(frozen=True, slots=True)
class Piece:
    """Runs that are copied under one check. `part` are the positions they hold."""

    part: TokenRange
    runs: tuple[Run, ...]
    num_bytes: int


def plan_pieces(
    part: TokenRange, source: PageTable, target: PageTable, token_bytes: int, max_bytes: int
) -> tuple[Piece, ...]:
    """Cuts what moves of a layer for a non-empty `part`, `token_bytes` a token, into pieces of at most `max_bytes`, or
    of one token if that is more."""
    max_tokens = _even_tokens(len(part), max(1, max_bytes // token_bytes), source.page_size)
    pieces: list[Piece] = []
    runs: list[Run] = []
    begin = position = part.begin
    while position < part.end:
        room = begin + max_tokens - position
        run, tokens = _run(position, part, source, target, max_tokens, room)
        if tokens > room:
            pieces.append(_piece(begin, position, runs, token_bytes))
            runs, begin = [], position
            run, tokens = _run(position, part, source, target, max_tokens, max_tokens)
        runs.append(run)
        position += tokens
    pieces.append(_piece(begin, position, runs, token_bytes))
    return tuple(pieces)


def plan_pages(source: PageTable, target: PageTable, first_pages: int, max_pages: int) -> list[PageRuns]:
    """Whole pages between equal page sizes, in order of the source: reading at random costs more than writing so.

    Cut into pieces of at most `max_pages`, the first one of at most `first_pages`.
    """
    pages = np.column_stack((np.array(source.page_ids, np.int64), np.array(target.page_ids, np.int64)))
    pages = pages[np.argsort(pages[:, 0])]
    cuts = range(first_pages, len(pages), max_pages)
    return [_merged(piece) for piece in np.split(pages, cuts)]


def _merged(pages: NDArray[np.int64]) -> PageRuns:
    """(source, target) a page; those that are neighbours on both sides make one run."""
    is_first = np.ones(len(pages), bool)
    is_first[1:] = (np.diff(pages, axis=0) != 1).any(axis=1)
    firsts = np.flatnonzero(is_first)
    return np.column_stack((pages[firsts], np.diff(firsts, append=len(pages))))


def _even_tokens(num_tokens: int, max_tokens: int, page_size: int) -> int:
    """Tokens of a piece, at most `max_tokens`, so that as few pieces are as even as whole pages allow."""
    most = max_tokens - max_tokens % page_size or max_tokens
    even = -(-num_tokens // -(-num_tokens // most))
    return min(max_tokens, -(-even // page_size) * page_size)


def _run(
    position: int, part: TokenRange, source: PageTable, target: PageTable, max_tokens: int, room: int
) -> tuple[Run, int]:
    """What one copy moves from `position` on, and its number of tokens: what is together in a page on both sides, at
    most `max_tokens`; of whole pages, neighbours too while they have `room`."""
    from_index, from_token = _place(position, part, source)
    to_index, to_token = _place(position, part, target)
    from_page, to_page = source.page_ids[from_index], target.page_ids[to_index]
    tokens = min(part.end - position, max_tokens, source.page_size - from_token, target.page_size - to_token)
    if not tokens == source.page_size == target.page_size:
        from_tokens, to_tokens = slice(from_token, from_token + tokens), slice(to_token, to_token + tokens)
        return Run(slice(from_page, from_page + 1), from_tokens, slice(to_page, to_page + 1), to_tokens), tokens
    count, most = 1, min(part.end - position, room) // tokens
    while (
        count < most
        and source.page_ids[from_index + count] == from_page + count
        and target.page_ids[to_index + count] == to_page + count
    ):
        count += 1
    from_pages, to_pages = slice(from_page, from_page + count), slice(to_page, to_page + count)
    return Run(from_pages, WHOLE_PAGES, to_pages, WHOLE_PAGES), count * tokens


def _place(position: int, part: TokenRange, table: PageTable) -> tuple[int, int]:
    """Where the page of a position is in its table, and which of its tokens it is."""
    index, token = divmod(position, table.page_size)
    return index - part.begin // table.page_size, token


def spans(layer: int, pages: slice, tokens: slice, layout: PageLayout, page_count: int) -> list[tuple[int, int]]:
    """(offset, bytes) in a pool of neighbouring pages of a layer, or of tokens of one page: then one for keys and one
    for values of each head."""
    begin = layout.offset(layer, pages.start, page_count)
    if tokens == WHOLE_PAGES:
        return [(begin, (pages.stop - pages.start) * layout.layer_page_bytes)]
    head_bytes = layout.page_size * layout.token_bytes
    first = begin + tokens.start * layout.token_bytes
    num_bytes = (tokens.stop - tokens.start) * layout.token_bytes
    return [(first + head * head_bytes, num_bytes) for head in range(2 * layout.kv_head_count)]


def _piece(begin: int, end: int, runs: list[Run], token_bytes: int) -> Piece:
    return Piece(TokenRange(begin, end), tuple(runs), (end - begin) * token_bytes)
