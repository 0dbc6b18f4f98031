"""What is known of engines: cached blocks, joins and leaves, and choosing among them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.errors import EngineLost, NoEngine, NoPair
from services.router.fleet import choose
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, InFlight, Load
from services.router.fleet.member import Member
from services.router.request import ModelKey, PolicyRequest
from tests.fakes import FakeEngine, FakeError, FakeModel, Fault
from tests.router.harness import PROMPT, failing, model, running
from tests.router.vocabularies import byte_level, files

KEY = ModelKey("m", b"d", b"t")
BLOCKS = [bytes([number]) for number in range(6)]


def snapshot(name: str, *, transfer: bool = True, labels: dict[str, str] | None = None, **known: int) -> EngineSnapshot:
    info = EngineInfo(name, b"", "1.0", KEY, 4, 4096, 341, known.get("size", 8), transfer, labels or {})
    load = Load(running=known.get("running", 0), queued_tokens=known.get("queued", 0))
    return EngineSnapshot(f"{name}:1", info, load, load.sequences, load.queued_tokens, CachedBlocks())


def names(engines: tuple[EngineSnapshot, ...]) -> str:
    return "".join(engine.info.name for engine in engines)


def test_the_least_loaded_engine_counts_for_its_size() -> None:
    engines = [snapshot("a", running=4, size=8), snapshot("b", running=6, size=32), snapshot("c", running=3, size=8)]
    assert choose.least_loaded(engines).info.name == "b"
    with pytest.raises(NoEngine):
        choose.least_loaded([])


def test_equal_engines_are_chosen_by_waiting_prompts_then_by_name() -> None:
    assert choose.least_loaded([snapshot("b"), snapshot("a")]).info.name == "a"
    assert choose.least_loaded([snapshot("a", queued=9), snapshot("b")]).info.name == "b"


@pytest.mark.parametrize("number", range(2, 7))
def test_every_fleet_splits_into_two_disjoint_roles(number: int) -> None:
    engines = [snapshot("abcdef"[i]) for i in reversed(range(number))]
    prefill, decode = choose.roles(engines)
    assert names((*prefill, *decode)) == "abcdef"[:number]
    assert prefill
    assert decode
    assert choose.roles(engines[::-1]) == (prefill, decode)


async def test_programs_see_engines_by_name_in_whatever_order_they_came() -> None:
    async with running(engines=[FakeEngine(model(), name) for name in ("c", "a", "b")]) as suite:
        [served] = suite.router.registry.models()
        assert names(tuple(suite.router.registry.engines(served.key))) == "abc"


def test_labels_decide_where_both_roles_are_given() -> None:
    labelled = [
        snapshot("a", labels={"role": "decode"}),
        snapshot("b", labels={"role": "prefill"}),
        snapshot("c"),
    ]
    assert tuple(map(names, choose.roles(labelled))) == ("b", "a")
    only_one_role = [snapshot("a", labels={"role": "decode"}), snapshot("b")]
    assert names(choose.pair(only_one_role)) == "ab"


def test_pairs_take_the_least_loaded_of_each_role() -> None:
    engines = [snapshot("a", queued=100), snapshot("b"), snapshot("c", running=2), snapshot("d", running=1)]
    assert names(choose.pair(engines)) == "bd"


@pytest.mark.parametrize(
    ("engines", "cause"),
    [
        ([], "ONE_ENGINE"),
        ([snapshot("a")], "ONE_ENGINE"),
        ([snapshot("a"), snapshot("b", transfer=False)], "NO_KVTRANSFER"),
    ],
)
def test_there_may_be_no_pair(engines: list[EngineSnapshot], cause: str) -> None:
    with pytest.raises(NoPair) as caught:
        choose.pair(engines)
    assert caught.value.cause == cause


def test_pairs_by_prefix_go_where_most_is_cached() -> None:
    request = PolicyRequest("r", KEY, tuple(range(16)))
    hashes = request.block_hashes(4)
    engines = [snapshot(name) for name in "abcd"]
    engines[1].blocks.apply(KvEvent(0, True, True, stored=tuple(hashes[:1])))
    engines[2].blocks.apply(KvEvent(0, True, True, stored=tuple(hashes[:3])))
    assert names(choose.pair_by_prefix(request, engines)) == "bc"
    assert engines[2].cached_prefix(request) == 12
    salted = dataclasses.replace(request, cache_salt="other")
    assert engines[2].cached_prefix(salted) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=20), st.integers(0, 10))
def test_blocks_follow_the_events(changes: list[tuple[bool, int]], begin: int) -> None:
    blocks, expected = CachedBlocks(), {BLOCKS[0]}
    assert blocks.apply(KvEvent(begin, True, True, stored=(BLOCKS[0],)))
    for number, (stored, index) in enumerate(changes, start=begin + 1):
        event = {"stored" if stored else "removed": (BLOCKS[index],)}
        assert blocks.apply(KvEvent(number, **event))
        expected = expected | {BLOCKS[index]} if stored else expected - {BLOCKS[index]}
    assert len(blocks) == len(expected)


def test_a_gap_asks_for_a_new_snapshot_and_keeps_the_old_state_until_it_is_complete() -> None:
    blocks = CachedBlocks()
    blocks.apply(KvEvent(3, True, True, stored=tuple(BLOCKS[:2])))
    assert not blocks.apply(KvEvent(5, stored=(BLOCKS[2],)))
    assert not blocks.apply(KvEvent(6, stored=(BLOCKS[2],)))
    assert blocks.longest_prefix(BLOCKS) == 2
    assert blocks.apply(KvEvent(9, True, stored=tuple(BLOCKS[:3])))
    assert blocks.longest_prefix(BLOCKS) == 2
    assert blocks.apply(KvEvent(9, True, True, stored=(BLOCKS[3],)))
    assert blocks.longest_prefix(BLOCKS) == 4
    assert blocks.apply(KvEvent(10, removed=(BLOCKS[3],)))
    assert blocks.longest_prefix(BLOCKS) == 3


async def test_a_gap_in_the_stream_is_healed() -> None:
    engine = FakeEngine(model(), "a")
    async with running(engines=[engine]) as suite:
        engine.kv.publish(PROMPT[:8], "")
        await suite.cached(engine, 2)
        engine.faults["skip"] = Fault()  # sequence numbers jump
        engine.kv.publish(PROMPT[:16], "")
        await suite.cached(engine, 4)
        assert len(engine.called("WatchKvEvents")) == 2


async def test_an_engine_without_cache_events_still_serves() -> None:
    engine = FakeEngine(model(), "a")
    engine.faults["WatchKvEvents"] = Fault(FakeError("not today"))
    async with running(engines=[engine]) as suite:
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)


@pytest.mark.parametrize("method", ["GetInfo", "GetTokenizer"])
async def test_an_engine_that_cannot_be_described_joins_when_it_can(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [FakeEngine(model(), "a"), FakeEngine(model(name="other"), "b")]
    async with running(engines=engines) as suite:
        old, address = engines[1], engines[1].address
        await old.stop()
        await suite.until(lambda: len(suite.router.registry.models()) == 1)
        new = FakeEngine(model(name="other", version="2"), "b")
        fault = new.faults[method] = Fault(FakeError("not yet there"))
        if method == "GetTokenizer":
            new.model = FakeModel(files(byte_level()) | {"more": b"x"}, name="other", version="2")
        await new.start(address)
        await fault.reached.wait()
        await suite.until(lambda: "not yet there" in suite.router.registry.members[address].problem)
        await suite.until(lambda: "engine cannot join" in caplog.text)
        new.faults.clear()
        await suite.until(lambda: len(suite.router.registry.models()) == 2)
        assert (await suite.generate(model="other")).legs[0].engine == "b"
        suite.engines[:] = [engines[0], new]
        await suite.idle()
        await new.stop()


async def test_an_engine_that_is_not_there_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async with running(1) as suite:
        nobody = suite.first.address
        await suite.first.stop()
        member = suite.router.registry.members[nobody]
        tries = 0

        async def watch_health() -> AsyncIterator[bool]:
            nonlocal tries
            tries += 1
            raise EngineLost("nobody is there")
            yield True

        member.client.watch_health = watch_health
        await suite.until(lambda: tries > 12)
        told = [each.fields["address"] for each in caplog.records if each.msg == "engine cannot join"]
        assert told == [nobody]
        suite.engines.clear()


async def test_an_engine_of_another_contract_is_not_used() -> None:
    engines = [FakeEngine(model(), "a"), FakeEngine(model(), "b")]
    async with running(engines=engines) as suite:
        address = engines[1].address
        await engines[1].stop()
        newer = FakeEngine(model(), "b")
        newer.contract_version = "2.0"
        await newer.start(address)
        await suite.until(lambda: "contract 2.0" in suite.router.registry.members[address].problem)
        assert (await suite.generate(policy="disaggregated")).policy == "data_parallel"
        await newer.stop()
        suite.engines.pop()


async def test_draining_engines_finish_what_they_have_and_get_nothing_new() -> None:
    async with running() as suite:
        first = suite.first
        first.gate.clear()
        call = suite.stream()
        await first.until(lambda: first.sequences)
        first.drain()
        await suite.until(lambda: len(suite.router.registry.models()[0].members) == 1)
        assert (await suite.generate()).legs[0].engine == "b"
        first.gate.set()
        pieces = [piece async for piece in call]
        assert [token for piece in pieces for token in piece.token_ids] == model().generate(PROMPT, 8)


def asked(member: Member) -> InFlight:
    """What the router has under way there."""
    underway = member.snapshot().underway
    return InFlight(len(underway.answers), underway.prompt_tokens)


async def test_load_counts_while_verbs_run_and_returns_to_nothing() -> None:
    async with running(policy="disaggregated") as suite:
        sender, receiver = (suite.router.registry.members[engine.address] for engine in suite.engines)
        fault = suite.first.faults["RemoteSend"] = Fault()
        call = suite.stream()
        await fault.reached.wait()
        assert asked(sender) == InFlight(0, 50)
        assert sender.snapshot().prompt_tokens >= 50  # before the engine has told of them
        call.cancel()
        await suite.idle()
        suite.first.faults.clear()
        suite.engines[1].faults["StartGenerate"] = fault = Fault(after_tokens=2)
        call = suite.stream(cache_salt="x")
        await fault.reached.wait()
        assert [piece async for piece in limited(call, 1)]
        assert asked(receiver) == InFlight(1, 0)
        assert receiver.snapshot().sequences >= 1
        call.cancel()
        await suite.idle()
        while asked(receiver) != InFlight():
            await suite.generate()
        assert asked(sender) == InFlight()


async def limited(call, number: int):  # type: ignore[no-untyped-def]
    """The first messages of a call."""
    for _ in range(number):
        yield await call.read()


async def test_a_router_without_engines_says_so() -> None:
    async with running(1) as suite:
        await suite.first.stop()
        await suite.until(lambda: not suite.router.serving)
        for policy in ("data_parallel", "disaggregated"):
            with failing("UNAVAILABLE", "NO_ENGINE") as caught:
                await suite.generate(policy=policy)
            assert caught.value.retry_delay_s
        suite.engines.clear()
