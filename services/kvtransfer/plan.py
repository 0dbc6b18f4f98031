"""Which tokens of a layer move from which pages to which: runs of pages, cut into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.protocol.layout import PageLayout
from services.protocol.ranges import TokenRange

WHOLE_PAGES = slice(None)


@dataclass(frozen=True, slots=True)
class PageTable:
    """Pages in token order, the first one holding the first token of what is planned."""

    page_ids: tuple[int, ...]
    page_size: int


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
    pieces: list[Piece] = []
    runs: list[Run] = []
    begin = position = part.begin
    for run, tokens in _runs(part, source, target, max(1, max_bytes // token_bytes)):
        if runs and (position + tokens - begin) * token_bytes > max_bytes:
            pieces.append(_piece(begin, position, runs, token_bytes))
            runs, begin = [], position
        if runs and _continues(runs[-1], run):
            last = runs.pop()
            run = Run(
                slice(last.source_pages.start, run.source_pages.stop),
                WHOLE_PAGES,
                slice(last.target_pages.start, run.target_pages.stop),
                WHOLE_PAGES,
            )
        runs.append(run)
        position += tokens
    pieces.append(_piece(begin, position, runs, token_bytes))
    return tuple(pieces)


def _runs(part: TokenRange, source: PageTable, target: PageTable, max_tokens: int) -> Iterator[tuple[Run, int]]:
    """Tokens that are together in a page on both sides, and their number; at most `max_tokens` at once."""
    position = part.begin
    while position < part.end:
        from_page, from_token = _place(position, part, source)
        to_page, to_token = _place(position, part, target)
        tokens = min(part.end - position, max_tokens, source.page_size - from_token, target.page_size - to_token)
        from_tokens, to_tokens = slice(from_token, from_token + tokens), slice(to_token, to_token + tokens)
        if tokens == source.page_size == target.page_size:
            from_tokens = to_tokens = WHOLE_PAGES
        yield Run(slice(from_page, from_page + 1), from_tokens, slice(to_page, to_page + 1), to_tokens), tokens
        position += tokens


def _place(position: int, part: TokenRange, table: PageTable) -> tuple[int, int]:
    """The page of a position, and which of its tokens it is."""
    index, token = divmod(position, table.page_size)
    return table.page_ids[index - part.begin // table.page_size], token


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


def _continues(last: Run, run: Run) -> bool:
    """Whether `run` is the whole page after `last`, which is whole as well."""
    return (
        last.whole
        and run.whole
        and run.source_pages.start == last.source_pages.stop
        and run.target_pages.start == last.target_pages.stop
    )


def _piece(begin: int, end: int, runs: list[Run], token_bytes: int) -> Piece:
    return Piece(TokenRange(begin, end), tuple(runs), (end - begin) * token_bytes)
