"""The prefix cache as a radix tree of pages: an edge is one block of tokens, a node the page that holds their KV."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.core.blocks import BlockChain
from services.engine.core.prefix_cache import CacheChange, PrefixMatch
from services.protocol.pages import PageLedger


@dataclass(frozen=True, slots=True, order=True)
class _Node:
    """A published block. Siblings sort by their tokens."""

    tokens: tuple[int, ...]
    name: bytes
    parent: bytes
    page: int


class PrefixTree:
    """See PrefixCache.

    Nodes are found by the chained hash of their block. Siblings are kept sorted by their tokens, so that the one with
    the longest common beginning is a neighbour of where the wanted tokens would stand.
    """

    def __init__(self, ledger: PageLedger, page_size: int) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._nodes: dict[bytes, _Node] = {}
        self._children: dict[bytes, list[_Node]] = {}
        self._by_page: dict[int, _Node] = {}
        # Not a dict, which passes over all that have left it to find its first.
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages without a user, least recently released first
        self._change: dict[bytes, bool] = {}  # block -> stored (True) or removed (False) since the last look

    def match(self, chain: BlockChain, limit: int) -> PrefixMatch:
        """See PrefixCache."""
        pages: list[int] = []
        for index in range(limit // self._page_size):
            node = self._nodes.get(chain.hash(index))
            if node is None:
                break
            pages.append(node.page)
        num_tokens = len(pages) * self._page_size
        wanted = chain.block(len(pages))[: limit - num_tokens]
        partial, num_common = self._closest(chain.parent(len(pages)), wanted)
        if partial is not None and num_common:
            pages.append(partial.page)
        return PrefixMatch(tuple(pages), num_tokens + num_common)

    def publish(self, chain: BlockChain, index: int, page: int) -> int:
        """See PrefixCache."""
        name, parent = chain.hash(index), chain.parent(index)
        known = self._nodes.get(name)
        if known is not None:
            return known.page
        if index and parent not in self._nodes:
            return page
        self._ledger.publish(page)
        node = _Node(chain.block(index), name, parent, page)
        self._nodes[name] = self._by_page[page] = node
        insort(self._children.setdefault(parent, []), node)
        self._note(name, stored=True)
        return page

    def retain(self, pages: Sequence[int]) -> None:
        """See PrefixCache."""
        self._ledger.retain(pages)
        for page in pages:
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> tuple[int, ...]:
        """See PrefixCache."""
        freed = self._ledger.release(pages)
        # Successors first, because what has one is not evicted: the oldest that is idle is then a leaf.
        for page in reversed(pages):
            if page in self._by_page and self._ledger.users(page) == 0:
                self._idle[page] = None
        return freed

    def make_room(self, num_free: int) -> tuple[int, ...]:
        """See PrefixCache."""
        freed: list[int] = []
        while self._ledger.num_free < num_free:
            leaf = next((page for page in self._idle if self._by_page[page].name not in self._children), None)
            if leaf is None:
                break
            self._evict(self._by_page[leaf])
            freed.append(leaf)
        return tuple(freed)

    def take_change(self) -> CacheChange:
        """See PrefixCache."""
        stored = tuple(name for name, is_stored in self._change.items() if is_stored)
        removed = tuple(name for name, is_stored in self._change.items() if not is_stored)
        self._change.clear()
        return CacheChange(stored, removed)

    def snapshot(self) -> tuple[bytes, ...]:
        """See PrefixCache. A block is published after its predecessor and evicted before it, so age is enough."""
        return tuple(self._nodes)

    def check(self) -> None:
        """Raises AssertionError if the tree contradicts itself or the ledger. For tests and debugging."""
        for node in self._nodes.values():
            assert self._by_page[node.page] is node, "a page stands for two blocks"
            assert self._ledger.is_published(node.page), "a page of the tree is not published"
            assert node in self._children[node.parent], "a node is not among its siblings"
            is_idle = self._ledger.users(node.page) == 0
            assert is_idle == (node.page in self._idle), "a page is idle in one book and used in the other"
        names = {node.name for siblings in self._children.values() for node in siblings}
        assert names == self._nodes.keys(), "a sibling is not in the tree"
        assert self._by_page.keys() >= self._idle.keys(), "an idle page is not in the tree"
        assert len(self._by_page) == len(self._nodes), "a page without a block"

    def _closest(self, parent: bytes, wanted: tuple[int, ...]) -> tuple[_Node | None, int]:
        """The child of `parent` whose tokens begin most like `wanted`, and how many they share."""
        siblings = self._children.get(parent, [])
        place = bisect_left(siblings, wanted, key=lambda node: node.tokens)
        best, longest = None, 0
        for node in siblings[max(0, place - 1) : place + 1]:
            num_common = _num_common(node.tokens, wanted)
            if num_common > longest:
                best, longest = node, num_common
        return best, longest

    def _evict(self, node: _Node) -> None:
        self._ledger.evict(node.page)
        del self._nodes[node.name], self._by_page[node.page], self._idle[node.page]
        siblings = self._children[node.parent]
        del siblings[bisect_left(siblings, node)]
        if not siblings:
            del self._children[node.parent]
        self._note(node.name, stored=False)

    def _note(self, name: bytes, *, stored: bool) -> None:
        if name in self._change:
            del self._change[name]  # it left and came back, or came and left: nothing changed for those who watch
        else:
            self._change[name] = stored


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
