"""Choosing among many engines gives what looking at each of them gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from services.protocol.errors import Code, ServiceError
from services.router.errors import NoEngine, NoPair
from services.router.fleet import choose
from services.router.fleet.block_index import BlockIndex
from services.router.fleet.breaker import Breaker, BreakerCall, BreakerConfig
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, Load
from services.router.fleet.roster import Roster
from services.router.request import ModelKey, PolicyRequest

MODEL = ModelKey("m", b"weights", b"vocabulary")
REQUEST = PolicyRequest("r", MODEL, tuple(range(64)))


class Broken(ServiceError):
    code = Code.UNAVAILABLE
    reason = "UNAVAILABLE"


@dataclass(eq=False)
class Listed:
    """An engine whose facts a test sets."""

    address: str
    info: EngineInfo
    blocks: CachedBlocks
    load: Load = field(default_factory=Load)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.opened: list[Listed] = []
        self.breaker = Breaker(
            self.address, BreakerConfig(num_failures=1), lambda: self.now, lambda: self.opened.append(self)
        )

    def snapshot(self) -> EngineSnapshot:
        load = self.load
        return EngineSnapshot(self.address, self.info, load, load.sequences, load.queued_tokens, self.blocks)

    def fail(self) -> None:
        with pytest.raises(Broken), BreakerCall(self.breaker):
            raise Broken("gone")


def fleet(source: random.Random, index: BlockIndex, size: int, roles: tuple[str, ...]) -> list[Listed]:
    engines = []
    for number in range(size):
        labels = {choose.ROLE: role} if (role := source.choice(roles)) else {}
        info = EngineInfo(
            name=f"n{source.randrange(size)}",
            incarnation=b"",
            contract_version="1.0",
            model=MODEL,
            page_size=source.choice((4, 8)),
            max_context=100,
            vocab_size=100,
            max_batch_size=source.choice((0, 4, 8)),
            can_transfer=source.random() < 0.9,
            labels=labels,
        )
        engines.append(Listed(f"{number}:1", info, CachedBlocks(index)))
    return engines


def change(source: random.Random, engine: Listed) -> None:
    engine.load = Load(running=source.randrange(3), queued_tokens=source.choice((0, 0, 64)))
    hashes = REQUEST.block_hashes(engine.info.page_size)
    stored = tuple(hashes[: source.choice((0, 0, 1, 3, len(hashes)))])
    engine.blocks.apply(KvEvent(0, snapshot=True, snapshot_complete=True, stored=stored))


def same(found: Callable[[], Any], wanted: Callable[[], Any]) -> None:
    """Both give the same engines, or the same refusal."""
    assert outcome(found) == outcome(wanted)


def outcome(choosing: Callable[[], Any]) -> list[str]:
    """Addresses of what was chosen, or the refusal."""
    try:
        chosen = choosing()
    except NoEngine as error:
        return [error.reason]
    except NoPair as error:
        return [error.reason, error.cause]
    return [each.address for each in (chosen if isinstance(chosen, tuple) else (chosen,))]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 9, 40])
@pytest.mark.parametrize("roles", [("",), ("", "prefill", "decode"), ("prefill", "decode"), ("decode",)])
def test_it_chooses_as_the_plain_way(size: int, roles: tuple[str, ...]) -> None:
    source, index = random.Random(f"{size} {roles}"), BlockIndex()
    engines = fleet(source, index, size, roles)
    roster = Roster(engines, index)
    for _ in range(12):
        for engine in source.sample(engines, size // 2):
            change(source, engine)
            roster.moved(engine)
            engine.now += source.choice((0.0, 0.6))
            if source.random() < 0.1 and engine.breaker.admits:
                engine.fail()
                roster.opened(engine.opened.pop())
        avoided = {each.address for each in source.sample(engines, source.choice((0, size // 3)))}
        left = [each.snapshot() for each in engines if each.breaker.admits and each.address not in avoided]
        same(lambda: roster.least_loaded(avoided), lambda: choose.least_loaded(left))  # noqa: B023
        if left:
            same(lambda: roster.pair(avoided), lambda: choose.pair(left))  # noqa: B023
            same(lambda: roster.pair_by_prefix(REQUEST, avoided), lambda: choose.pair_by_prefix(REQUEST, left))  # noqa: B023


@pytest.mark.parametrize("size", [1, 6, 7, 40])
def test_the_shortlist_has_the_best_of_each_kind_and_few_others(size: int) -> None:
    source, index = random.Random(size), BlockIndex()
    engines = fleet(source, index, size, ("",))
    roster = Roster(engines, index)
    for _ in range(20):
        for engine in source.sample(engines, size // 2):
            change(source, engine)
            roster.moved(engine)
        avoided = {each.address for each in source.sample(engines, size // 3)}
        left = [each.snapshot() for each in engines if each.address not in avoided]
        listed = {each.address: each for each in roster.shortlist(REQUEST, 2, avoided)}
        assert len(listed) == (len(left) if len(left) <= 6 else min(len(listed), 6))
        assert not avoided & listed.keys()
        assert choose.least_loaded(left).address in listed
        shortest = min(each.prompt_tokens for each in left)
        assert shortest in {each.snapshot().prompt_tokens for each in listed.values()}
        longest = max(each.cached_prefix(REQUEST) for each in left)
        assert longest in {each.snapshot().cached_prefix(REQUEST) for each in listed.values()}


def test_the_shortlist_has_some_of_the_pool_and_some_of_the_others() -> None:
    """However little the one or the other has to do."""
    source, index = random.Random(3), BlockIndex()
    engines = fleet(source, index, 40, ("",))
    roster = Roster(engines, index)
    for pool_load in (Load(), Load(running=9, queued_tokens=5000)):
        pool = frozenset(each.address for each in source.sample(engines, 12))
        for engine in engines:
            engine.load = pool_load if engine.address in pool else Load(running=2, queued_tokens=1)
            roster.moved(engine)
        listed = {each.address for each in roster.shortlist(REQUEST, 2, (), pool)}
        assert len(listed & pool) == 2
        assert 2 <= len(listed - pool) <= 4
        avoided = pool - {next(iter(pool))}
        assert len({each.address for each in roster.shortlist(REQUEST, 2, avoided, pool)} & pool) == 1
    everyone = frozenset(each.address for each in engines)
    assert roster.shortlist(REQUEST, 2, (), everyone)


def test_who_is_shut_out_is_none_of_those_that_are_looked_at() -> None:
    source, index = random.Random(5), BlockIndex()
    engines = fleet(source, index, 6, ("",))
    roster = Roster(engines, index)
    engines[2].fail()
    roster.opened(engines[2])
    assert {each.address for each in roster.snapshots()} == {each.address for each in engines} - {engines[2].address}


def test_the_index_knows_what_the_engines_know() -> None:
    source, index = random.Random(0), BlockIndex()
    names = [bytes([number]) * 16 for number in range(20)]
    engines = [CachedBlocks(index) for _ in range(5)]
    known: dict[CachedBlocks, set[bytes]] = {engine: set() for engine in engines}
    for engine in engines:
        engine.apply(KvEvent(0, snapshot=True, snapshot_complete=True))
    sequence = dict.fromkeys(engines, 0)
    for _ in range(300):
        engine = source.choice(engines)
        stored, removed = (tuple(source.sample(names, source.randrange(5))) for _ in range(2))
        match source.randrange(12):
            case 0:
                engine.apply(KvEvent(0, snapshot=True, stored=stored))
                engine.apply(KvEvent(sequence[engine], snapshot=True, snapshot_complete=True, stored=removed))
                known[engine] = {*stored, *removed}
            case 1:
                engine.clear()
                engine.apply(KvEvent(sequence[engine], snapshot=True, snapshot_complete=True))
                known[engine] = set()
            case _:
                sequence[engine] += 1
                assert engine.apply(KvEvent(sequence[engine], stored=stored, removed=removed))
                known[engine] = known[engine] - {*removed} | {*stored}
        for name in names:
            assert index.holders(name) == sum(1 << each.slot for each in engines if name in known[each])
    assert len(index) == len(set().union(*known.values()))
    for engine in engines:
        engine.close()
    assert len(index) == 0


def test_a_slot_is_given_again() -> None:
    index = BlockIndex()
    engines = [CachedBlocks(index) for _ in range(3)]
    engines[1].apply(KvEvent(0, snapshot=True, snapshot_complete=True, stored=(b"a",)))
    engines[1].close()
    assert (len(index), CachedBlocks(index).slot, CachedBlocks(index).slot) == (0, 1, 3)


def test_an_engine_that_recovers_is_chosen_again() -> None:
    index = BlockIndex()
    engines = fleet(random.Random(1), index, 3, ("",))
    for number, engine in enumerate(engines):
        engine.info, engine.load = replace(engine.info, max_batch_size=4), Load(running=number)
    roster = Roster(engines, index)
    assert roster.least_loaded(()) is engines[0]
    engines[0].fail()
    roster.opened(engines[0].opened.pop())
    assert roster.least_loaded(()) is engines[1]
    assert Roster(engines, index).least_loaded(()) is engines[1]  # also where the fleet has changed since
    engines[0].now = 10.0
    assert roster.least_loaded(()) is engines[0]
