"""Requests grouped by topic: those that share a long prefix, found without looking at any text.

Prompts are followed block by block, GRAIN tokens each, through a tree of the blocks' chained hashes. Where most
requests go on together the shared context gets longer. Where several ways lead on, one that adds a long shared part of
its own is a topic of its own; short ones, such as questions about one document, stay one topic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from services.router.fleet.homes import GRAIN
from services.router.planning.traffic import Sample
from services.router.request import PolicyRequest

MAX_TOPICS = 32


@dataclass(frozen=True, slots=True)
class TopicLimits:
    """What counts as a topic: a shared part of so many tokens, asked for so often within the window."""

    tokens: int = 256
    requests: float = 3.0


@dataclass(frozen=True, slots=True)
class Topic:
    """Requests that share a long prefix. `context` has the prefix for its prompt, to call verbs with."""

    name: str  # of the context: the same wherever it is met
    context: PolicyRequest
    rate: float  # requests a second

    @property
    def tokens(self) -> int:
        """Of the context."""
        return len(self.context.prompt)


class _Node:
    """Requests that agree up to here."""

    __slots__ = ("children", "depth", "request", "weight")

    def __init__(self, depth: int) -> None:
        self.depth = depth  # blocks
        self.weight = 0.0  # requests
        self.children: dict[bytes, _Node] = {}
        self.request: PolicyRequest | None = None  # the latest of them

    def hot(self, limits: TopicLimits) -> list[_Node]:
        """Where enough requests go on together."""
        return [child for child in self.children.values() if child.weight >= limits.requests]


def find_topics(
    samples: Iterable[Sample], span_s: float, limits: TopicLimits, deadline: float = float("inf")
) -> tuple[Topic, ...]:
    """The topics of these requests, those asked for most first, at most MAX_TOPICS. `span_s`: seconds that the samples
    are of. `deadline`: of verbs that are called with their contexts."""
    found = sorted(_split(_tree(samples), 0, limits), key=lambda each: -each[1])
    return tuple(_topic(node, weight / span_s, deadline) for node, weight in found[:MAX_TOPICS])


def _tree(samples: Iterable[Sample]) -> _Node:
    root = _Node(0)
    for sample in samples:
        node = root
        node.weight += sample.weight
        for block in sample.request.block_hashes(GRAIN):
            child = node.children.get(block)
            if child is None:
                child = node.children[block] = _Node(node.depth + 1)
            node = child
            node.weight += sample.weight
            node.request = sample.request
    return root


def _split(node: _Node, base: int, limits: TopicLimits) -> Iterator[tuple[_Node, float]]:
    """Topics among the requests of a node, each with those that belong to no other one. What they share must be long
    enough behind `base`, where the context of the topic around them ends."""
    end = _trunk(node, limits)
    is_long = (end.depth - base) * GRAIN >= limits.tokens
    rest = end.weight
    for child in end.hot(limits):
        for inner, weight in _split(child, end.depth if is_long else base, limits):
            rest -= weight
            yield inner, weight
    if is_long and rest >= limits.requests:
        yield end, rest


def _trunk(node: _Node, limits: TopicLimits) -> _Node:
    """As far as at least half of the requests go on together and the others go nowhere in numbers."""
    while len(hot := node.hot(limits)) == 1 and 2 * hot[0].weight >= node.weight:
        [node] = hot
    return node


def _topic(node: _Node, rate: float, deadline: float) -> Topic:
    assert node.request is not None  # all but the root have one, and the root is no topic
    prompt = node.request.prompt[: node.depth * GRAIN]
    name = node.request.block_hashes(GRAIN)[node.depth - 1].hex()[:12]
    context = replace(node.request, request_id=f"topic {name}", prompt=prompt, deadline=deadline, num_generated=0)
    return Topic(name, context, rate)
