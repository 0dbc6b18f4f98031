"""Parts of a model, against sets of (layer, head)."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.protocol.errors import LayoutMismatch
from services.protocol.extents import Coverage, Extent, ModelPart, covers, legs
from services.protocol.ranges import TokenRange

bounds = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted).filter(lambda b: b[0] < b[1]).map(tuple)
extents = st.builds(Extent, bounds, bounds)
parts = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted).map(lambda b: TokenRange(*b))

Cell = tuple[int, int]


def cells(extent: Extent) -> set[Cell]:
    return set(itertools.product(range(*extent.layers), range(*extent.kv_heads)))


@settings(deadline=None)
@given(extents, st.lists(extents, max_size=5))
def test_covers(whole: Extent, parts: list[Extent]) -> None:
    assert covers(whole, parts) == (cells(whole) <= set().union(*map(cells, parts)))


@settings(deadline=None)
@given(extents, st.lists(extents, min_size=1, max_size=4))
def test_legs_are_what_both_have(source: Extent, targets: list[Extent]) -> None:
    if not covers(source, targets):
        with pytest.raises(LayoutMismatch):
            legs(source, targets)
        return
    found = {leg.target_index: leg for leg in legs(source, targets)}
    for index, target in enumerate(targets):
        common = cells(source) & cells(target)
        assert (index in found) == bool(common)
        if not common:
            continue
        leg = found[index]
        heads = range(source.kv_head_count)[leg.source_heads]
        layers = [layer + source.layers[0] for layer in leg.source_layers]
        assert {(layer, head + source.kv_heads[0]) for layer in layers for head in heads} == common
        heads = range(target.kv_head_count)[leg.target_heads]
        layers = [leg.target_layer(layer) + target.layers[0] for layer in leg.source_layers]
        assert {(layer, head + target.kv_heads[0]) for layer in layers for head in heads} == common
        assert leg.head_count == len(heads)


@settings(deadline=None)
@given(extents, parts, st.lists(st.tuples(parts, extents), max_size=6), st.tuples(parts, extents))
def test_coverage(
    whole: Extent, part: TokenRange, added: list[tuple[TokenRange, Extent]], gone: tuple[TokenRange, Extent]
) -> None:
    coverage, there = Coverage(), set[tuple[int, Cell]]()
    for tokens, extent in added:
        coverage = coverage.add(tokens, extent)
        there |= set(itertools.product(range(tokens.begin, tokens.end), cells(extent)))
    wanted = set(itertools.product(range(part.begin, part.end), cells(whole)))
    assert coverage.covers(part, whole) == (wanted <= there)
    # What came together with something that is gone counts no more either.
    there = set[tuple[int, Cell]]()
    for tokens, extent in added:
        lost = range(gone[0].begin, gone[0].end) if cells(extent) & cells(gone[1]) else range(0)
        there |= set(itertools.product(set(range(tokens.begin, tokens.end)) - set(lost), cells(extent)))
    assert coverage.remove(*gone).covers(part, whole) == (wanted <= there)


def test_impossible_parts() -> None:
    for layers in ((0, 0), (2, 1), (-1, 1)):
        with pytest.raises(LayoutMismatch):
            Extent(layers, (0, 1))
    with pytest.raises(LayoutMismatch):
        ModelPart(Extent((0, 1), (1, 3)), Extent((0, 1), (0, 2)))
    with pytest.raises(LayoutMismatch):
        ModelPart(Extent((1, 2), (0, 1)), Extent((1, 2), (0, 1)))
