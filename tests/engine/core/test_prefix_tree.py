"""The radix tree does what the naive list does, whatever is done to both."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.engine.core.blocks import BlockChain
from services.engine.core.prefix_cache import PrefixCache
from services.engine.core.prefix_tree import PrefixTree
from services.protocol.pages import PageLedger
from tests.engine.core.naive_prefix_cache import NaivePrefixCache

PAGE_SIZE = 2
NUM_PAGES = 8
TOKENS = st.lists(st.integers(0, 2), max_size=9)
SEEDS = st.sampled_from([b"one tenant", b"another"])


class Side:
    """One cache, its ledger, and what its pages hold."""

    def __init__(self, make: type[PrefixTree] | type[NaivePrefixCache]) -> None:
        self.ledger = PageLedger(NUM_PAGES)
        self.cache: PrefixCache = make(self.ledger, PAGE_SIZE)
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    def hold(self, chain: BlockChain) -> tuple[int, list[int]] | None:
        """Acts as a sequence would: match, retain, make room, allocate, publish. None if the pages do not suffice."""
        num_full = len(chain.tokens) // PAGE_SIZE
        match = self.cache.match(chain, len(chain.tokens))
        for index, page in enumerate(match.page_ids):
            seed, tokens = self.content[page]
            matched = chain.tokens[: min(match.num_tokens, (index + 1) * PAGE_SIZE)]
            assert seed == chain.seed
            assert tokens[: len(matched)] == tuple(matched)
        pages = list(match.page_ids[: match.num_tokens // PAGE_SIZE])
        self.cache.retain(pages)
        self.cache.make_room(num_full - len(pages))
        if self.ledger.num_free < num_full - len(pages):
            self.cache.release(pages)
            return None
        pages += self.ledger.allocate(num_full - len(pages))
        for index, page in enumerate(pages):
            if not self.ledger.is_published(page):
                self.content[page] = (chain.seed, tuple(chain.tokens[: (index + 1) * PAGE_SIZE]))
                assert self.cache.publish(chain, index, page) == page
        return match.num_tokens, pages


class TreeEqualsNaive(RuleBasedStateMachine):
    """Page ids may differ; contents, counts and events may not."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.naive = Side(PrefixTree), Side(NaivePrefixCache)

    @rule(target=held, tokens=TOKENS, seed=SEEDS)
    def hold(self, tokens: list[int], seed: bytes) -> tuple[list[int], list[int]]:
        chain = BlockChain(tokens, PAGE_SIZE, seed)
        from_tree, from_naive = self.tree.hold(chain), self.naive.hold(chain)
        if from_tree is None or from_naive is None:
            assert from_tree == from_naive
            return [], []
        assert from_tree[0] == from_naive[0]
        return from_tree[1], from_naive[1]

    @rule(pages=consumes(held))
    def release(self, pages: tuple[list[int], list[int]]) -> None:
        self.tree.cache.release(pages[0])
        self.naive.cache.release(pages[1])

    @rule(tokens=TOKENS, seed=SEEDS, limit=st.integers(0, 9))
    def match(self, tokens: list[int], seed: bytes, limit: int) -> None:
        chain, limit = BlockChain(tokens, PAGE_SIZE, seed), min(limit, len(tokens))
        ours, theirs = self.tree.cache.match(chain, limit), self.naive.cache.match(chain, limit)
        assert ours.num_tokens == theirs.num_tokens
        assert len(ours.page_ids) == len(theirs.page_ids) == -(-ours.num_tokens // PAGE_SIZE)

    @rule(num_free=st.integers(0, NUM_PAGES))
    def make_room(self, num_free: int) -> None:
        assert len(self.tree.cache.make_room(num_free)) == len(self.naive.cache.make_room(num_free))

    @rule()
    def look(self) -> None:
        ours, theirs = self.tree.cache.take_change(), self.naive.cache.take_change()
        assert (set(ours.stored), set(ours.removed)) == (set(theirs.stored), set(theirs.removed))

    @invariant()
    def same_blocks(self) -> None:
        self.tree.cache.check()  # type: ignore[attr-defined]
        assert sorted(self.tree.cache.snapshot()) == sorted(self.naive.cache.snapshot())
        assert self.tree.ledger.counts() == self.naive.ledger.counts()


TestTreeEqualsNaive = pytest.mark.slow(TreeEqualsNaive.TestCase)
TestTreeEqualsNaive.settings = settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)


def test_a_block_already_known_keeps_its_page() -> None:
    ledger = PageLedger(4)
    tree = PrefixTree(ledger, PAGE_SIZE)
    chain = BlockChain([1, 2], PAGE_SIZE, b"")
    first, second = ledger.allocate(2)
    assert tree.publish(chain, 0, first) == first
    assert tree.publish(chain, 0, second) == first
    assert not ledger.is_published(second)


def test_a_block_whose_predecessor_is_unknown_is_not_taken() -> None:
    ledger = PageLedger(4)
    tree = PrefixTree(ledger, PAGE_SIZE)
    (page,) = ledger.allocate(1)
    assert tree.publish(BlockChain([1, 2, 3, 4], PAGE_SIZE, b""), 1, page) == page
    assert not ledger.is_published(page)
    assert tree.snapshot() == ()


def test_a_page_that_another_continues_is_not_evicted_before_it() -> None:
    ledger = PageLedger(2)
    tree = PrefixTree(ledger, PAGE_SIZE)
    chain = BlockChain([1, 2, 3, 4], PAGE_SIZE, b"")
    first, second = ledger.allocate(2)
    tree.publish(chain, 0, first)
    tree.publish(chain, 1, second)
    tree.release([first])  # its successor has a user still, as a send may have
    assert tree.make_room(1) == ()
    tree.release([second])
    assert tree.make_room(2) == (second, first)


def test_a_block_that_leaves_and_comes_back_is_no_change() -> None:
    ledger = PageLedger(1)
    tree = PrefixTree(ledger, PAGE_SIZE)
    chain = BlockChain([1, 2], PAGE_SIZE, b"")
    tree.publish(chain, 0, *ledger.allocate(1))
    assert tree.take_change().stored == (chain.hash(0),)
    tree.release([0])
    tree.make_room(1)
    tree.publish(chain, 0, *ledger.allocate(1))
    assert not tree.take_change()
