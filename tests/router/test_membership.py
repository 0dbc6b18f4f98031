"""Engines that join, leave and drain while requests run, and two routers over one fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio
import pytest
from microserve.router.v1 import admin_pb2, router_pb2_grpc

from services.router.app import Router
from services.router.config import RouterConfig
from services.router.errors import FleetFull
from services.router.fleet import membership
from services.router.fleet.client import ReservedKv
from services.rpc.channel import make_channel
from services.rpc.status import from_rpc_error
from tests.fakes import FakeEngine, Fault
from tests.router.harness import FAST, PROMPT, Running, at_once, complete, failing, model, request, running


@contextmanager
def remote() -> Iterator[None]:
    """Errors of grpc as RemoteError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def listed(suite: Running) -> dict[str, admin_pb2.EngineStatus]:
    response = await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
    return {each.address: each for each in response.engines}


async def test_an_engine_added_by_an_operator_gets_work() -> None:
    async with running(1) as suite:
        new = FakeEngine(model(), "b", peers=suite.first.peers)
        await new.start()
        await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=new.address))
        await suite.until(lambda: suite.router.registry.members[new.address].healthy)
        assert await at_once(suite, 4, (suite.first, new)) == {"a", "b"}
        assert list((await listed(suite))[new.address].sources) == ["admin"]
        assert list((await listed(suite))[suite.first.address].sources) == ["static"]
        await new.stop()


async def test_an_engine_at_two_addresses_counts_once() -> None:
    async with running(1, policy="disaggregated") as suite:
        address, other = suite.first.address, suite.first.address.replace("127.0.0.1", "localhost")
        await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=other))
        members = suite.router.registry.members
        await suite.until(lambda: not members[other].problem)
        answer = await suite.generate()
        assert (answer.policy, [leg.engine for leg in answer.legs]) == ("data_parallel", ["a"])  # nobody to hand KV to
        (one,) = suite.router.registry.models()
        assert suite.router.registry.capacity(one.key).sequences == suite.first.max_batch_size
        status = (await listed(suite))[other]
        assert (status.healthy, status.problem) == (False, f"it is the engine at {address}")
        await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address=address))
        assert not suite.router.registry.models()  # nor does it get work under its other name
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=address))
        assert [leg.engine for leg in (await suite.generate()).legs] == ["a"]


@pytest.mark.parametrize("address", ["", "nowhere", "host:0", "host:99999", "ho st:1", ":1", "h" * 300 + ":1"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    async with running(1) as suite:
        with failing("INVALID_ARGUMENT", "INVALID_REQUEST"), remote():
            await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=address))


async def test_requests_of_an_engine_that_is_removed_end_in_their_own_time() -> None:
    async with running(2, policy="disaggregated") as suite:
        first, second = suite.engines
        fault = first.faults["RemoteSend"] = Fault()
        hanging = suite.stream(cache_salt="x")
        await fault.reached.wait()
        first.faults.clear()
        second.gate.clear()
        call = suite.stream()
        await second.until(lambda: second.sequences)
        member = suite.router.registry.members[second.address]
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=second.address))
        assert set(await listed(suite)) == {first.address}
        assert (await suite.generate()).legs[0].engine == "a"  # nothing new begins there
        second.gate.set()
        pieces = [piece async for piece in call]
        assert [token for piece in pieces for token in piece.token_ids] == model().generate(PROMPT, 8)
        hanging.cancel()
        async with asyncio.timeout(60):
            await member.unused()
        with failing("NOT_FOUND", "UNKNOWN_ENGINE"), remote():
            await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=second.address))
        await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=second.address))
        await suite.until(lambda: suite.router.registry.members[second.address].healthy)
        assert (await suite.generate()).policy == "disaggregated"


async def test_an_engine_that_is_removed_between_two_verbs_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(2, policy="disaggregated") as suite:
        prefill, decode = suite.engines
        registry = suite.router.registry
        client = registry.members[decode.address].client
        prep_recv, reserved, removed = client.prep_recv, asyncio.Event(), asyncio.Event()

        async def prep_recv_slowly(*args: Any) -> ReservedKv:
            kv = await prep_recv(*args)
            reserved.set()
            await removed.wait()
            return kv

        monkeypatch.setattr(client, "prep_recv", prep_recv_slowly)
        call = suite.stream()
        await reserved.wait()
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=prefill.address))
        async with asyncio.timeout(60):
            while registry._retiring:  # it was not called yet, so it is let go at once
                await asyncio.wait(registry._retiring.values())
        removed.set()
        pieces = [piece async for piece in call]
        assert [token for piece in pieces for token in piece.token_ids] == model().generate(PROMPT, 8)


async def test_a_drained_engine_gets_nothing_new_until_it_is_resumed() -> None:
    async with running(2) as suite:
        address = suite.first.address
        await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address=address))
        status = (await listed(suite))[address]
        assert (status.healthy, status.problem) == (False, "an operator drains it")
        assert {(await suite.generate()).legs[0].engine for _ in range(3)} == {"b"}
        await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address=address, resume=True))
        assert (await suite.generate()).legs[0].engine == "a"
        with failing("NOT_FOUND", "UNKNOWN_ENGINE"), remote():
            await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address="nobody:1"))


async def test_sources_are_kept_apart() -> None:
    async with running(2) as suite:
        fleet, members = suite.router.membership, suite.router.registry.members
        first, second = (engine.address for engine in suite.engines)
        fleet.publish("dns", [second])
        assert fleet.sources(second) == ("dns", "static")
        fleet.publish("static", [first])
        assert set(members) == {first, second}
        fleet.publish("dns", [])
        assert set(members) == {first}
        fleet.remove(first)
        fleet.publish("register", [first])
        assert set(members) == set()  # an operator's word holds until it is taken back
        fleet.add(first)
        assert set(members) == {first}


async def test_an_operators_word_outlives_a_source_that_forgets_the_engine_for_a_moment() -> None:
    async with running(2) as suite:
        address, other = (engine.address for engine in suite.engines)
        membership, members = suite.router.membership, suite.router.registry.members
        await suite.admin.DrainEngine(admin_pb2.DrainEngineRequest(address=address))
        membership.publish("static", [other])
        assert address not in members
        membership.publish("static", [address, other])
        await suite.until(lambda: not members[address].problem)
        assert (await listed(suite))[address].problem == "an operator drains it"
        assert {(await suite.generate()).legs[0].engine for _ in range(3)} == {"b"}
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=address))
        await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=address))  # and begins anew
        await suite.until(lambda: members[address].healthy)


async def test_an_operators_word_stands_beside_another_one_that_comes_while_nobody_names_the_engine() -> None:
    async with running(3) as suite:
        drained, removed, other = (engine.address for engine in suite.engines)
        membership, members = suite.router.membership, suite.router.registry.members
        membership.drain(drained, True)
        membership.remove(removed)
        membership.publish("static", [other])
        membership.drain(other, True)
        membership.remove(other)
        membership.publish("static", [drained, removed, other])
        assert set(members) == {drained}
        assert members[drained].drained


async def test_only_so_many_words_of_operators_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_ENGINES", 2)
    async with running(1) as suite:
        fleet, members = suite.router.membership, suite.router.registry.members
        for address in ("x:1", "y:1", "z:1"):
            fleet.add(address)
            fleet.remove(address)
        fleet.publish("static", ["x:1", "z:1"])
        assert set(members) == {"x:1"}


async def test_a_fleet_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MAX_ENGINES", 3)
    async with running(2) as suite:
        before = set(suite.router.registry.members)
        with pytest.raises(FleetFull):
            suite.router.membership.publish("dns", ["x:1", "y:1"])
        assert set(suite.router.registry.members) == before
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=suite.first.address))
        suite.router.membership.publish("dns", ["x:1", "y:1"])
        with failing("RESOURCE_EXHAUSTED", "FLEET_FULL"), remote():
            await suite.admin.AddEngine(admin_pb2.AddEngineRequest(address=suite.first.address))
        suite.router.membership.publish("dns", [])
        assert suite.first.address not in suite.router.registry.members  # its removal still stands


async def test_two_routers_over_one_fleet_agree_and_do_not_disturb_each_other() -> None:
    async with running(4, policy="context_aware:little=4") as suite:
        config = RouterConfig(
            listen="127.0.0.1:0",
            engine=tuple(engine.address for engine in reversed(suite.engines)),
            policy="context_aware:little=4",
        )
        router = Router(config, backoff=FAST)
        channel = make_channel((await router.start()).grpc)
        other = Running(router, suite.engines, router_pb2_grpc.RouterServiceStub(channel), suite.admin)
        try:
            await other.until(lambda: all(each.healthy for each in router.registry.members.values()))
            warm = await suite.generate(request_id="same")
            decode = next(engine for engine in suite.engines if engine.name == warm.legs[-1].engine)
            for each in (suite, other):
                await each.cached(decode, len(PROMPT) // 4)
            longer = (*PROMPT, *range(100, 120))
            here, there = await asyncio.gather(
                suite.generate(longer, request_id="same"),
                complete(other.stub, request(longer, request_id="same")),
            )
            assert here.legs[-1].engine == there.legs[-1].engine == decode.name  # prefix affinity alike
            assert list(here.token_ids) == list(there.token_ids) == model().generate(longer, 8)
            owners = {call.owner_id for engine in suite.engines for call in engine.called("Session")}
            assert len(owners) == 2
            decode.gate.clear()
            call = suite.stream(longer)
            await decode.until(lambda: decode.sequences)
            await router.close()  # one router's end is not the other's
            decode.gate.set()
            pieces = [piece async for piece in call]
            assert [token for piece in pieces for token in piece.token_ids] == model().generate(longer, 8)
        finally:
            await router.close()
            await channel.close()
