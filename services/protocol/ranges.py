"""Half-open token ranges and sets of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from services.protocol.errors import InvalidRange


@dataclass(frozen=True, slots=True, order=True)
class TokenRange:
    """Token positions [begin, end). Raises InvalidRange unless 0 <= begin <= end."""

    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end:
            raise InvalidRange(f"[{self.begin}, {self.end}) is not a range of tokens")

    def __len__(self) -> int:
        return self.end - self.begin

    def __str__(self) -> str:
        return f"[{self.begin}, {self.end})"

    def contains(self, other: TokenRange) -> bool:
        """Whether every position of `other` is in this range; an empty range is in every range."""
        return not other or (self.begin <= other.begin and other.end <= self.end)

    def overlaps(self, other: TokenRange) -> bool:
        """Whether the two have a position in common."""
        return max(self.begin, other.begin) < min(self.end, other.end)

    def page_indices(self, page_size: int) -> range:
        """Indices, counted from the start of the prompt, of the pages that hold these positions."""
        if not self:
            return range(self.begin // page_size, self.begin // page_size)
        return range(self.begin // page_size, (self.end - 1) // page_size + 1)


@dataclass(frozen=True, slots=True)
class RangeSet:
    """A set of positions as sorted, disjoint, non-adjacent, non-empty ranges."""

    ranges: tuple[TokenRange, ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[TokenRange]) -> RangeSet:
        """The union of any ranges."""
        merged: list[TokenRange] = []
        for item in sorted(r for r in ranges if r):
            if merged and item.begin <= merged[-1].end:
                merged[-1] = TokenRange(merged[-1].begin, max(merged[-1].end, item.end))
            else:
                merged.append(item)
        return cls(tuple(merged))

    def add(self, item: TokenRange) -> RangeSet:
        """This set and one more range."""
        return RangeSet.of((*self.ranges, item))

    def remove(self, item: TokenRange) -> RangeSet:
        """This set without one range."""
        left = (TokenRange(r.begin, max(r.begin, min(r.end, item.begin))) for r in self.ranges)
        right = (TokenRange(min(r.end, max(r.begin, item.end)), r.end) for r in self.ranges)
        return RangeSet.of((*left, *right)) if item else self

    def covers(self, item: TokenRange) -> bool:
        """Whether every position of `item` is in the set."""
        return not item or any(r.contains(item) for r in self.ranges)

    def overlaps(self, item: TokenRange) -> bool:
        """Whether any position of `item` is in the set."""
        return any(r.overlaps(item) for r in self.ranges)

    def __iter__(self) -> Iterator[TokenRange]:
        return iter(self.ranges)
