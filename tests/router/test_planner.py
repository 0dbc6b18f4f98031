"""What a planner moves, and what requests find then."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent

import pytest
from microserve.router.v1 import admin_pb2
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from prometheus_client import REGISTRY

from services.router.app import Router
from services.router.config import RouterConfig
from services.router.request import PolicyRequest
from services.rpc.channel import make_channel
from tests.fakes import FakeEngine, FakeError, Fault
from tests.router.harness import FAST, Running, model, running, verbs
from tests.router.planner_suite import CONTEXT, OFTEN, PAGES, TWICE, engines, make_hot, planner, question, seen

EVERYWHERE = str(Path(__file__).resolve().parents[2] / "docs/examples/planners/everywhere.py")


async def test_a_hot_context_is_copied_before_requests_come() -> None:
    fleet = engines()
    async with running(engines=fleet, **TWICE) as suite:
        assert await make_hot(suite) == "a"
        await suite.cached(fleet[1], PAGES)
        assert fleet[1].called("Session") == []
        fleet[0].drain()
        await suite.until(lambda: len(suite.router.registry.models()[0].members) == 1)
        answer = await suite.generate(question(9))
        assert answer.legs[0].engine == "b"
        assert answer.usage.cached_token_count == len(CONTEXT)
        assert list(answer.token_ids) == model().generate(question(9), 8)


@pytest.mark.parametrize(
    ("max_context", "tokens", "asked_with"),
    [(258, 256, 257), (257, 256, 257), (256, 256, 256), (257, 252, 256)],
)
async def test_a_context_is_asked_for_as_the_beginning_of_longer_prompts(
    max_context: int, tokens: int, asked_with: int, tmp_path: Path
) -> None:
    """Engines compute the last token of a prompt in its own way; only a context as long as they take ends there."""
    path = tmp_path / "by_hand.py"
    path.write_text(
        dedent(f"""
        from services.router.planners import Move
        from services.router.planning.topics import Topic
        from services.router.request import PolicyRequest


        async def planner(fleet):
            async for view in fleet.views():
                if not view.tried:
                    topic = Topic("by hand", PolicyRequest("by hand", view.model, {CONTEXT}), 1.0)
                    await fleet.carry_out([Move(topic, *view.sites, {tokens}, "by hand")])
        """)
    )
    peers: dict[str, FakeEngine] = {}
    fleet = [FakeEngine(model(max_context=max_context), name, peers=peers) for name in "ab"]
    async with running(engines=fleet, planner=str(path), **OFTEN) as suite:
        await suite.generate((5, 6, 7))
        [move] = (await seen(suite, lambda reply: reply.moves)).moves
        assert (move.code, move.token_count) == ("OK", tokens)
        [reserve] = [each for engine in fleet for each in engine.called("PrepRecv")]
        [send] = [each for engine in fleet for each in engine.called("RemoteSend")]
        for asked, end in ((reserve, reserve.end), (send, send.range.end)):
            assert (len(asked.prompt_token_ids), end) == (asked_with, tokens)
            assert tuple(asked.prompt_token_ids[: len(CONTEXT)]) == CONTEXT
        assert send.prompt_token_count == asked_with


async def test_what_it_did_is_shown() -> None:
    fleet = engines()
    moved = REGISTRY.get_sample_value("microserve_router_planner_moved_tokens_total") or 0.0
    async with running(engines=fleet, **TWICE) as suite:
        await make_hot(suite)
        reply = await seen(suite, lambda reply: reply.moves and len(reply.topics) and len(reply.topics[0].homes) == 2)
        assert (reply.planner, reply.problem) == ("by_topic:replicas=2", "")
        assert reply.look_count >= 2
        [topic], [move] = reply.topics, reply.moves
        assert (topic.token_count, list(topic.homes), topic.model) == (len(CONTEXT), ["a", "b"], "fake")
        assert dict(topic.cached_token_count)["a"] == len(CONTEXT)
        assert topic.requests_per_s > 0
        assert (move.topic, move.source_engine, move.target_engine) == (topic.name, "a", "b")
        assert (move.token_count, move.moved_token_count, move.code) == (len(CONTEXT), len(CONTEXT), "OK")
        assert "saves" in move.why
        assert dict(reply.move_count_by_code) == {"OK": 1}
        assert [(each.name, each.current) for each in reply.programs] == [("by_topic", True)]
        total = REGISTRY.get_sample_value("microserve_router_planner_moved_tokens_total")
        assert total == moved + len(CONTEXT)
        assert REGISTRY.get_sample_value("microserve_router_planner_running") == 1
    assert REGISTRY.get_sample_value("microserve_router_planner_running") == 0


async def test_requests_follow_their_topic_home_until_the_planner_stops() -> None:
    fleet = engines("abc")
    async with running(engines=fleet, policy="at_home", planner="by_topic", **OFTEN) as suite:
        fleet[2].kv.publish(CONTEXT, "")
        await suite.cached(fleet[2], PAGES)
        assert await make_hot(suite) == "a", "nobody knows of the topic yet"
        # Both have all of it, and nobody is busy: the first by address among equals.
        await seen(suite, lambda reply: reply.topics and reply.topics[0].homes)
        [home] = (await planner(suite)).topics[0].homes
        fleet[0].gate.clear()
        busy = suite.stream((300,) * 20, policy="data_parallel")
        await fleet[0].until(lambda: fleet[0].sequences)
        fleet[0].gate.set()
        assert (await suite.generate(question(7))).legs[0].engine == home
        busy.cancel()
        await suite.admin.StopPlanner(admin_pb2.StopPlannerRequest())
        assert suite.router._host.homes.of(asked(suite)) == ()
        assert (await planner(suite)).problem == "it was stopped"


def asked(suite: Running) -> PolicyRequest:
    return PolicyRequest("r", suite.router.registry.models()[0].key, question(1))


async def test_a_refused_move_is_recorded_and_not_repeated() -> None:
    fleet = engines()
    fleet[1].faults["PrepRecv"] = Fault(FakeError("no pages"))
    async with running(engines=fleet, **TWICE) as suite:
        await make_hot(suite)
        reply = await seen(suite, lambda reply: reply.moves)
        looks = reply.look_count
        reply = await seen(suite, lambda reply: reply.look_count > looks + 5)
        assert [move.code for move in reply.moves] == ["NO_PAGES"]
        assert reply.problem == ""


async def test_a_link_gets_no_more_than_its_share() -> None:
    """The first context costs the link all it may carry in an hour: the second one waits."""
    fleet = engines()
    async with running(engines=fleet, planner_bytes_per_s=1.0, **TWICE) as suite:
        await make_hot(suite)
        await seen(suite, lambda reply: reply.moves)
        other = tuple(reversed(CONTEXT))
        for number in range(4):
            await suite.generate((*other, 300 + number))
        looks = (await seen(suite, lambda reply: len(reply.topics) == 2)).look_count
        reply = await seen(suite, lambda reply: reply.look_count > looks + 3)
        assert len(reply.moves) == 1


async def test_nothing_is_kept_of_links_that_have_had_no_more_than_their_share() -> None:
    async with running(engines=engines(), **TWICE) as suite:
        await make_hot(suite)
        looks = (await seen(suite, lambda reply: reply.moves)).look_count
        await seen(suite, lambda reply: reply.look_count > looks + 2)
        run = suite.router.planners._current
        assert run is not None
        assert run.mover._free_at == {}


async def test_a_second_router_finds_what_the_first_has_moved() -> None:
    """Each sees traffic of its own, and both see the caches: the second sends nothing and wants the same homes."""
    fleet = engines("abc")
    async with running(engines=fleet, **TWICE) as one:
        addresses = tuple(each.address for each in fleet)
        config = RouterConfig(listen="127.0.0.1:0", engine=addresses, **TWICE)  # type: ignore[arg-type]
        async with another(config) as two:
            await make_hot(one)
            [move] = (await seen(one, lambda reply: reply.moves)).moves
            assert (move.source_engine, move.target_engine) == ("a", "b")
            await two.cached(fleet[0], PAGES)
            await two.cached(fleet[1], PAGES)
            await make_hot(two)
            for suite in (one, two):
                reply = await seen(suite, lambda reply: reply.topics and len(reply.topics[0].homes) == 2)
                looks = reply.look_count
                reply = await seen(suite, lambda reply, looks=looks: reply.look_count > looks + 5)  # type: ignore[misc]
                assert list(reply.topics[0].homes) == ["a", "b"]
            assert len([send for each in fleet for send in each.called("RemoteSend")]) == 1


@asynccontextmanager
async def another(config: RouterConfig) -> AsyncIterator[Running]:
    """One more router over engines that run."""
    router = Router(config, backoff=FAST)
    addresses = await router.start()
    try:
        async with make_channel(addresses.grpc) as channel:
            stub, admin = RouterServiceStub(channel), AdminServiceStub(channel)
            suite = Running(router, [], stub, admin)
            await suite.until(lambda: all(member.healthy for member in router.registry.members.values()))
            yield suite
    finally:
        await router.close()


async def test_a_planner_in_a_file_copies_contexts_everywhere() -> None:
    fleet = engines("abc")
    async with running(engines=fleet, planner=EVERYWHERE, **OFTEN) as suite:
        await make_hot(suite)
        reply = await seen(suite, lambda reply: len(reply.moves) == 2)
        assert sorted(move.target_engine for move in reply.moves) == ["b", "c"]
        assert all(verb == "start_generate" for verb, *_ in verbs(await suite.generate(question(5))))
