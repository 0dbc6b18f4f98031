"""What a planner sees at one moment: topics and engines as plain values, and what computing and moving would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from services.router.planning.topics import Topic
from services.router.request import ModelKey


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """An engine. Two are the same only if they are of the same view."""

    name: str
    address: str
    busy: float  # share of the time in which it computed, of late
    page_size: int  # tokens
    usable_pages: int  # free, or cached and used by nobody now
    longest_pages: int  # of the longest prompt that it takes
    can_transfer: bool
    cached: Mapping[str, int]  # tokens of each topic's context, by the topic's name

    def pages(self, tokens: int) -> int:
        """That so many tokens fill."""
        return -(-tokens // self.page_size)


class Costs(Protocol):
    """Times as they were measured."""

    def prefill_s(self, site: Site, tokens: int, after: int) -> float:
        """Seconds to compute so many tokens of a prompt after those that are cached."""

    def send_s(self, source: Site, target: Site, tokens: int) -> float:
        """Seconds to reserve room for so many tokens and to move their KV, cached at the source."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One model's traffic and engines."""

    model: ModelKey
    topics: tuple[Topic, ...]  # those asked for most first
    rate: float  # requests a second, those of no topic too
    sites: tuple[Site, ...]  # engines that take work, by address
    homes: Mapping[str, tuple[str, ...]]  # addresses, by the topic's name, as last set
    tried: frozenset[tuple[str, str]]  # (topic's name, target's address) of the moves of the last minute
    costs: Costs


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """A wish: the target is to have so many tokens of a topic's context cached as well."""

    topic: Topic
    source: Site
    target: Site
    tokens: int
    why: str
