"""Parts of a model's KV: some layers and some KV heads, and what of one part belongs to another.

A tensor parallel engine has one pool a rank, each with a part of the model; sender and receiver may be cut differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from services.protocol.errors import LayoutMismatch
from services.protocol.ranges import RangeSet, TokenRange

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Layers [begin, end) and KV heads [begin, end) of a model. Raises LayoutMismatch if it is empty or negative."""

    layers: Interval
    kv_heads: Interval

    def __post_init__(self) -> None:
        if not (0 <= self.layers[0] < self.layers[1] and 0 <= self.kv_heads[0] < self.kv_heads[1]):
            raise LayoutMismatch("a part of a model has at least one layer and one KV head")

    @property
    def layer_count(self) -> int:
        """Layers in it."""
        return self.layers[1] - self.layers[0]

    @property
    def kv_head_count(self) -> int:
        """KV heads in it."""
        return self.kv_heads[1] - self.kv_heads[0]

    def contains(self, other: Extent) -> bool:
        """Whether all of `other` is in it."""
        return _inside(other.layers, self.layers) and _inside(other.kv_heads, self.kv_heads)

    def overlaps(self, other: Extent) -> bool:
        """Whether some head of some layer is in both."""
        shared = _common(self.layers, other.layers), _common(self.kv_heads, other.kv_heads)
        return all(begin < end for begin, end in shared)


# All of a model that nobody cuts into parts.
UNDIVIDED = Extent((0, 1), (0, 1))


@dataclass(frozen=True, slots=True)
class ModelPart:
    """Which part of which whole a pool holds."""

    extent: Extent
    whole: Extent

    @classmethod
    def all_of(cls, layer_count: int, kv_head_count: int) -> ModelPart:
        """A whole model of so many layers and heads."""
        whole = Extent((0, layer_count), (0, kv_head_count))
        return cls(whole, whole)

    def __post_init__(self) -> None:
        if (self.whole.layers[0], self.whole.kv_heads[0]) != (0, 0) or not self.whole.contains(self.extent):
            raise LayoutMismatch("a pool holds layers or KV heads that its model does not have")


@dataclass(frozen=True, slots=True)
class Leg:
    """What of a sender's part goes to one of the receiver's parts, number `target_index`."""

    target_index: int
    source: Extent
    target: Extent

    @property
    def head_count(self) -> int:
        """Heads that both have."""
        begin, end = self._heads
        return end - begin

    @property
    def source_heads(self) -> slice:
        """They, counted from the sender's first head."""
        return _counted_from(self.source.kv_heads[0], self._heads)

    @property
    def target_heads(self) -> slice:
        """They, counted from the receiver's first head."""
        return _counted_from(self.target.kv_heads[0], self._heads)

    @property
    def source_layers(self) -> range:
        """Layers that both have, counted from the sender's first one."""
        begin, end = _common(self.source.layers, self.target.layers)
        return range(begin - self.source.layers[0], end - self.source.layers[0])

    def target_layer(self, source_layer: int) -> int:
        """One of source_layers, counted from the receiver's first one."""
        return source_layer + self.source.layers[0] - self.target.layers[0]

    @property
    def _heads(self) -> Interval:
        return _common(self.source.kv_heads, self.target.kv_heads)


def legs(source: Extent, targets: Sequence[Extent]) -> tuple[Leg, ...]:
    """Where all of `source` goes. Raises LayoutMismatch if a part of it has no place among `targets`."""
    if not covers(source, targets):
        raise LayoutMismatch("the receiver has no place for some layers or heads of the sender")
    found = (Leg(index, source, target) for index, target in enumerate(targets))
    return tuple(leg for leg in found if leg.source_layers and leg.head_count > 0)


def covers(whole: Extent, parts: Iterable[Extent]) -> bool:
    """Whether the parts together, overlapping or not, have all of `whole`."""
    parts = tuple(parts)
    return all(
        any(part.contains(Extent(layers, kv_heads)) for part in parts)
        for layers in _cut(whole.layers, (part.layers for part in parts))
        for kv_heads in _cut(whole.kv_heads, (part.kv_heads for part in parts))
    )


@dataclass(frozen=True, slots=True)
class Coverage:
    """Tokens whose KV is in place, separately for every part of the model that came by itself."""

    tokens: tuple[tuple[Extent, RangeSet], ...] = ()

    def add(self, part: TokenRange, extent: Extent) -> Coverage:
        """This, and `part` of one more or the same extent."""
        known = dict(self.tokens)
        known[extent] = known.get(extent, RangeSet()).add(part)
        return Coverage(tuple(sorted(known.items(), key=lambda item: item[0])))

    def remove(self, part: TokenRange, extent: Extent) -> Coverage:
        """This, without `part` of whatever has something in common with the extent."""
        return Coverage(
            tuple((known, tokens.remove(part) if known.overlaps(extent) else tokens) for known, tokens in self.tokens)
        )

    def covers(self, part: TokenRange, whole: Extent) -> bool:
        """Whether every token of `part` has every layer and head of `whole`."""
        if not part:
            return True
        if len(self.tokens) == 1:
            ((extent, tokens),) = self.tokens
            return tokens.covers(part) and extent.contains(whole)
        bounds = ((r.begin, r.end) for _, tokens in self.tokens for r in tokens)
        return all(
            covers(whole, (extent for extent, tokens in self.tokens if tokens.covers(TokenRange(begin, end))))
            for begin, end in _cut((part.begin, part.end), bounds)
        )


def _cut(interval: Interval, others: Iterable[Interval]) -> list[Interval]:
    """`interval` in pieces that each of the others has wholly or not at all."""
    begin, end = interval
    inner = {bound for other in others for bound in other if begin < bound < end}
    bounds = [begin, *sorted(inner), end]
    return list(pairwise(bounds))


def _inside(inner: Interval, outer: Interval) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def _common(one: Interval, other: Interval) -> Interval:
    """Empty, with the end not after the begin, if they have nothing in common."""
    return max(one[0], other[0]), min(one[1], other[1])


def _counted_from(first: int, interval: Interval) -> slice:
    return slice(interval[0] - first, interval[1] - first)
