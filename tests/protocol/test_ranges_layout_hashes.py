"""Ranges, layout arithmetic, hashes, pages and request memory: the small pure parts."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.protocol.errors import InvalidRange, LayoutMismatch, RequestIdReused
from services.protocol.hashes import block_hashes, hash_seed, prompt_digest
from services.protocol.layout import Dtype, PageLayout
from services.protocol.pages import LedgerViolation, OutOfPages, PageLedger
from services.protocol.ranges import RangeSet, TokenRange
from services.protocol.requests import RequestLedger

ranges = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: TokenRange(min(p), max(p)))


@given(st.lists(ranges, max_size=8), ranges)
def test_range_sets_equal_sets_of_positions(parts: list[TokenRange], probe: TokenRange) -> None:
    whole = RangeSet.of(parts)
    positions = {p for part in parts for p in range(part.begin, part.end)}
    assert {p for r in whole for p in range(r.begin, r.end)} == positions
    assert whole.covers(probe) == positions.issuperset(range(probe.begin, probe.end))
    assert whole.overlaps(probe) == (not positions.isdisjoint(range(probe.begin, probe.end)))
    assert whole.add(probe) == RangeSet.of([*parts, probe])
    left = positions.difference(range(probe.begin, probe.end))
    assert whole.remove(probe) == RangeSet.of(TokenRange(p, p + 1) for p in left)
    assert all(a.end < b.begin for a, b in zip(whole.ranges, whole.ranges[1:], strict=False))


@given(ranges, st.integers(1, 7))
def test_page_indices_are_those_of_the_positions(part: TokenRange, page_size: int) -> None:
    assert list(part.page_indices(page_size)) == sorted({p // page_size for p in range(part.begin, part.end)})


@pytest.mark.parametrize(("begin", "end"), [(3, 2), (-1, 4)])
def test_a_range_that_is_none_is_refused(begin: int, end: int) -> None:
    with pytest.raises(InvalidRange):
        TokenRange(begin, end)


def test_offsets_tile_the_pool() -> None:
    layout = PageLayout(layer_count=3, kv_head_count=2, head_dim=4, page_size=5, dtype=Dtype.FLOAT16)
    offsets = [layout.offset(layer, page, 7) for layer in range(3) for page in range(7)]
    assert offsets == list(range(0, layout.pool_bytes(7), layout.layer_page_bytes))
    assert layout.layer_page_bytes == 2 * 2 * 5 * 4 * 2
    assert replace(layout, dtype=Dtype.FLOAT8_E4M3).pool_bytes(7) == layout.pool_bytes(7) // 2
    with pytest.raises(LayoutMismatch):
        PageLayout(layer_count=0, kv_head_count=1, head_dim=1, page_size=1, dtype=Dtype.FLOAT32)


def test_block_hashes_are_what_the_contract_says() -> None:
    seed = hash_seed(b"model", "tenant")
    assert seed == blake2b(b"modeltenant", digest_size=16).digest()
    tokens = [1, 2, 3, 70_000, 5]
    first = blake2b(seed + b"\1\0\0\0\2\0\0\0", digest_size=16).digest()
    second = blake2b(first + b"\3\0\0\0" + (70_000).to_bytes(4, "little"), digest_size=16).digest()
    assert block_hashes(tokens, 2, seed) == [first, second]
    assert block_hashes(tokens, 2, hash_seed(b"model", "other"))[0] != first
    assert prompt_digest(tokens, "a") != prompt_digest(tokens, "b")


@given(st.data())
def test_the_ledger_adds_up_whatever_happens(data: st.DataObject) -> None:
    ledger = PageLedger(6)
    held: list[int] = []
    quarantined: list[int] = []
    cached: list[int] = []
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["allocate", "release", "publish", "evict", "quarantine", "drained"])):
            case "allocate":
                count = data.draw(st.integers(0, 3))
                if count > ledger.num_free:
                    with pytest.raises(OutOfPages):
                        ledger.allocate(count)
                else:
                    held.extend(ledger.allocate(count))
            case "release" if held:
                assert ledger.release([held[-1]]) == (held.pop(),)
            case "publish" if held:
                page = held.pop()
                ledger.publish(page)
                assert ledger.release([page]) == ()
                cached.append(page)
            case "evict" if cached:
                ledger.evict(cached.pop())
            case "quarantine" if held:
                quarantined.append(held.pop())
                ledger.quarantine(quarantined[-1:])
            case "drained" if quarantined:
                ledger.drained([quarantined.pop()])
            case _:
                pass
        counts = ledger.counts()
        assert (counts.held, counts.cached, counts.quarantined) == (len(held), len(cached), len(quarantined))
        assert counts.free + counts.cached + counts.held + counts.quarantined == counts.total == 6


def test_the_ledger_refuses_what_would_share_a_page() -> None:
    ledger = PageLedger(2)
    (page,) = ledger.allocate(1)
    ledger.retain([page])
    with pytest.raises(LedgerViolation):
        ledger.quarantine([page])
    ledger.release([page, page])
    for misuse in (ledger.release, ledger.retain, ledger.quarantine, ledger.drained):
        with pytest.raises(LedgerViolation):
            misuse([page])
    with pytest.raises(LedgerViolation):
        ledger.evict(page)


def test_request_memory() -> None:
    ledger: RequestLedger[str] = RequestLedger(capacity=2)
    for key in "abc":
        ledger.begin(key, b"args", f"call {key}")
    assert ledger.find("a", b"args") == "call a"
    with pytest.raises(RequestIdReused):
        ledger.find("a", b"other")
    for key in "abc":
        ledger.finish(key)
    assert ledger.find("a", b"args") is None
    assert ledger.find("b", b"args") == "call b"
    assert ledger.live("b") is None
