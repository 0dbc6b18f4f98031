"""Gather and scatter against an oracle that reads every layout value by value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.kvtransfer.conversion import canonical_bytes, gather, layer_view, places, scatter
from services.protocol.layout import Dtype, PageLayout, PageOrder
from services.protocol.ranges import TokenRange
from tests.kvtransfer.canonical import read_token, write_token
from tests.kvtransfer.pattern import POISON, pattern

MAX_TOKENS = 20

layouts = st.builds(
    PageLayout,
    layer_count=st.just(1),
    kv_head_count=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    page_size=st.integers(1, 9),
    dtype=st.sampled_from(Dtype),
    order=st.sampled_from(PageOrder),
)
begins, lengths = st.integers(0, 30), st.integers(1, MAX_TOKENS)
parts = st.tuples(begins, lengths).map(lambda drawn: TokenRange(drawn[0], sum(drawn)))


def filled(layout: PageLayout, seed: int) -> NDArray[np.uint8]:
    """A pool, (layers, pages, bytes), with room for any part."""
    shape = (layout.layer_count, MAX_TOKENS // layout.page_size + 2, layout.layer_page_bytes)
    return pattern(seed, int(np.prod(shape))).reshape(shape)


def pages_of(part: TokenRange, layout: PageLayout, seed: int) -> list[int]:
    """As many pages as the part needs, in no order."""
    count = len(part.page_indices(layout.page_size))
    return np.random.default_rng(seed).permutation(MAX_TOKENS // layout.page_size + 2)[:count].tolist()


def place_of(position: int, part: TokenRange, layout: PageLayout, page_ids: list[int]) -> tuple[int, int, int]:
    page, token = divmod(position, layout.page_size)
    return 0, page_ids[page - part.begin // layout.page_size], token


@settings(max_examples=150, deadline=None)
@given(layouts, layouts, parts, st.data())
def test_gathered_and_scattered_is_what_was_there(
    source_layout: PageLayout, target_layout: PageLayout, part: TokenRange, data: st.DataObject
) -> None:
    """Any layout to any other of the same values: page sizes, orders, partial pages, head ranges on either side."""
    target_layout = replace(target_layout, head_dim=source_layout.head_dim, dtype=source_layout.dtype)
    head_count = data.draw(st.integers(1, min(source_layout.kv_head_count, target_layout.kv_head_count)))
    source_head = data.draw(st.integers(0, source_layout.kv_head_count - head_count))
    target_head = data.draw(st.integers(0, target_layout.kv_head_count - head_count))
    source, target = filled(source_layout, 1), filled(target_layout, 2)
    source_pages, target_pages = pages_of(part, source_layout, 3), pages_of(part, target_layout, 4)

    wanted = target.copy()
    for position in range(part.begin, part.end):
        for head in range(head_count):
            value = read_token(
                source, source_layout, place_of(position, part, source_layout, source_pages), source_head + head
            )
            place = place_of(position, part, target_layout, target_pages)
            write_token(wanted, target_layout, place, target_head + head, value)

    buffer = np.full(canonical_bytes(source_layout, head_count, len(part)), POISON, np.uint8)
    gather(
        layer_view(source[0], source_layout, slice(source_head, source_head + head_count)), part, source_pages, buffer
    )
    view = layer_view(target[0], target_layout, slice(target_head, target_head + head_count))
    scatter(view, part, target_pages, buffer)
    np.testing.assert_array_equal(target, wanted)


@settings(max_examples=50, deadline=None)
@given(layouts, parts)
def test_the_buffer_is_in_canonical_order(layout: PageLayout, part: TokenRange) -> None:
    """(k|v, head, token, element), with nothing in between: what travels between services."""
    pool, page_ids = filled(layout, 1), pages_of(part, layout, 3)
    wanted = [
        read_token(pool, layout, place_of(position, part, layout, page_ids), head)[half]
        for half in (0, 1)
        for head in range(layout.kv_head_count)
        for position in range(part.begin, part.end)
    ]
    buffer = np.empty(canonical_bytes(layout, layout.kv_head_count, len(part)), np.uint8)
    gather(layer_view(pool[0], layout), part, page_ids, buffer)
    np.testing.assert_array_equal(buffer, np.concatenate(wanted))


def test_places_are_the_pages_of_a_part() -> None:
    found = [(place.page_id, place.tokens.start, place.tokens.stop) for place in places(TokenRange(3, 9), [7, 5, 2], 4)]
    assert found == [(7, 3, 4), (5, 0, 4), (2, 0, 1)]
