"""Planners in a router: what they move, how they are started, swapped and looked at, and what becomes of bad ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import dedent, indent

import grpc
import pytest
from microserve.router.v1 import admin_pb2
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from prometheus_client import REGISTRY

from services.protocol.errors import ServiceError
from services.router.app import Router
from services.router.config import RouterConfig
from services.router.fleet.scope import RequestScope
from services.router.planning.host import PlannerLimits
from services.router.planning.mover import Mover
from services.router.planning.topics import TopicLimits
from services.router.planning.view import Move
from services.router.programs.watchdog import WatchdogLimits
from services.router.request import PolicyRequest
from services.rpc.channel import make_channel
from services.rpc.status import from_rpc_error
from tests.fakes import FakeEngine, FakeError, Fault
from tests.router.harness import FAST, PATIENCE_S, Running, failing, model, running, verbs

CONTEXT = tuple(range(3, 259))  # 256 tokens: four blocks, 64 pages
PAGES = len(CONTEXT) // 4
OFTEN = {"planner_interval": 0.01}
TWICE = {"planner": "by_topic:replicas=2", **OFTEN}
EVERYWHERE = str(Path(__file__).resolve().parents[2] / "docs/examples/planners/everywhere.py")


def question(number: int) -> tuple[int, ...]:
    return (*CONTEXT, 300, 300 + number)


def engines(names: str = "ab") -> list[FakeEngine]:
    peers: dict[str, FakeEngine] = {}
    return [FakeEngine(model(), name, peers=peers) for name in names]


async def planner(suite: Running) -> admin_pb2.GetPlannerResponse:
    return await suite.admin.GetPlanner(admin_pb2.GetPlannerRequest())


async def seen(
    suite: Running, condition: Callable[[admin_pb2.GetPlannerResponse], object]
) -> admin_pb2.GetPlannerResponse:
    """Asks until the planner's state is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition(reply := await planner(suite)):
            pass
    return reply


async def start(suite: Running, name: str, source: str = "") -> None:
    try:
        await suite.admin.StartPlanner(admin_pb2.StartPlannerRequest(name=name, source=source))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def make_hot(suite: Running, count: int = 3) -> str:
    """Asks for the context as often as makes a topic; returns the name of the engine that got all of these."""
    served = {(await suite.generate(question(number))).legs[0].engine for number in range(count)}
    [holder] = served
    return holder


# --- what it does -----------------------------------------------------------------------------------------------------


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


async def test_what_it_did_is_shown() -> None:
    fleet = engines()
    moved = REGISTRY.get_sample_value("microserve_router_planner_moved_total", {"unit": "tokens"}) or 0.0
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
        total = REGISTRY.get_sample_value("microserve_router_planner_moved_total", {"unit": "tokens"})
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


# --- how it is run ----------------------------------------------------------------------------------------------------

UPLOADS = {"admin_listen": "127.0.0.1:0", "allow_policy_upload": True}
IDLE = '''"""Looks on."""


async def planner(fleet):
    async for view in fleet.views():
        pass
'''


async def test_it_is_off_unless_it_is_asked_for() -> None:
    async with running() as suite:
        reply = await planner(suite)
        assert (reply.planner, reply.problem, len(reply.topics)) == ("", "none was started", 0)
        await suite.generate(question(1))
        assert suite.router._host.traffic.samples() == ()


async def test_planners_are_swapped_while_requests_are_served() -> None:
    async with running(**UPLOADS, **OFTEN) as suite:
        asking = [asyncio.create_task(suite.generate(question(number))) for number in range(30)]
        for name, source in (("by_topic", ""), ("idle", IDLE), ("by_topic:full=0.5", ""), ("idle", "")) * 3:
            await start(suite, name, source)
            reply = await planner(suite)
            assert (reply.planner, reply.problem) == (name, "")
            await seen(suite, lambda reply: reply.look_count)
        for number, each in enumerate(asking):
            assert list((await each).token_ids) == model().generate(question(number), 8)
        await suite.admin.StopPlanner(admin_pb2.StopPlannerRequest())
        await suite.admin.StopPlanner(admin_pb2.StopPlannerRequest())
        assert (await planner(suite)).problem == "it was stopped"


async def test_what_cannot_be_loaded_leaves_the_present_one() -> None:
    async with running(**UPLOADS, **OFTEN, planner="by_topic") as suite:
        for name, source, code, reason in (
            ("nobody", "", "NOT_FOUND", "UNKNOWN_POLICY"),
            ("", "", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("by_topic:full=2", "", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("by_topic:fuller=1", "", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("mine", "async def planner(fleet):\n    yield\n", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("mine", "async def planner():\n    pass\n", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("mine", "def planner(fleet:\n", "INVALID_ARGUMENT", "BAD_POLICY"),
            ("by_topic", IDLE, "INVALID_ARGUMENT", "BAD_POLICY"),
        ):
            with failing(code, reason):
                await start(suite, name, source)
            assert ((await planner(suite)).planner, (await planner(suite)).problem) == ("by_topic", "")


async def test_code_is_taken_only_where_it_may_be() -> None:
    async with running(**OFTEN) as suite:
        with failing("PERMISSION_DENIED", "UPLOAD_DISABLED"):
            await start(suite, "idle", IDLE)


@pytest.mark.parametrize("planner_name", ["nobody", "by_topic:full=0", "missing.py"])
def test_a_wrong_planner_is_refused_at_the_start(planner_name: str) -> None:
    with pytest.raises(ServiceError):
        Router(RouterConfig(listen="127.0.0.1:0", engine=("127.0.0.1:1",), planner=planner_name))


# --- bad ones ---------------------------------------------------------------------------------------------------------

LATE = "it did not ask for the next view within 0.2 s"
RESERVE = "fleet.engine(view.sites[0]).prep_recv(view.topics[0].context, end=256)"
BAD = {
    "raises": ("raise RuntimeError('so it is')", "it raised RuntimeError: so it is"),
    "exits": ("import sys\nsys.exit(3)", "it raised SystemExit: 3"),
    "ends": ("return", "it ended by itself"),
    "cancels_itself": ("asyncio.current_task().cancel()\nawait asyncio.Event().wait()", "it cancelled itself"),
    "stands_still": ("await asyncio.Event().wait()", LATE),
    "stands_still_holding_kv": (
        f"async with {RESERVE}:\n    await asyncio.Event().wait()",
        LATE,
    ),
    "ignores_its_end": (
        "while not stop.is_set():\n    try:\n        await stop.wait()\n"
        "    except asyncio.CancelledError:\n        pass",
        LATE,
    ),
    "leaks": (
        f"kept.append({RESERVE})\nawait kept[-1].__aenter__()",
        "it raised PolicyFailed: the planner left 1 reservations or sequences open",
    ),
    "raises_holding_kv": (f"async with {RESERVE}:\n    raise RuntimeError('held')", "it raised RuntimeError: held"),
}
HEADER = "import asyncio\nkept, stop = [], asyncio.Event()\n\nasync def planner(fleet):\n"
LOOP = "    async for view in fleet.views():\n        if not view.topics:\n            continue\n"
QUICK = PlannerLimits(interval_s=0.01, look_s=0.2, after_cancel_s=0.05, topics=TopicLimits(requests=1))
PATIENT = replace(QUICK, look_s=PATIENCE_S)


def write(folder: Path, name: str, body: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(HEADER + LOOP + indent(body, " " * 8) + "\n")
    return str(path)


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_planner_is_cut_and_the_router_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, problem = BAD[name]
    monkeypatch.setattr(RouterConfig, "planner_limits", QUICK if problem == LATE else PATIENT)
    async with running(planner=write(tmp_path, name, body)) as suite:
        await suite.generate(question(1))
        reply = await seen(suite, lambda reply: reply.problem)
        assert reply.problem == problem
        assert REGISTRY.get_sample_value("microserve_router_planner_failures_total", {"planner": name}) == 1
        await suite.idle()
        await suite.generate(question(2))
        monkeypatch.setattr(suite.router.planners, "_limits", PATIENT)
        await start(suite, "by_topic")
        await seen(suite, lambda reply: reply.planner == "by_topic" and reply.look_count)
        suite.router.planners.library.get(name).function.__globals__["stop"].set()
        left = {task for task in asyncio.all_tasks() if task.get_name() == f"planner {name}"}
        if left:
            await asyncio.wait(left, timeout=60)
        assert (await planner(suite)).problem == "", "what was left behind ends without a trace"


@pytest.mark.slow
async def test_a_planner_that_blocks_the_loop_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouterConfig, "planner_limits", PlannerLimits(interval_s=0.01, topics=TopicLimits(requests=1)))
    monkeypatch.setattr(RouterConfig, "watchdog_limits", WatchdogLimits(block_s=0.2))
    async with running(
        planner=write(tmp_path, "spins", f"async with {RESERVE}:\n    while True:\n        pass")
    ) as suite:
        await suite.generate(question(1))
        assert (await seen(suite, lambda reply: reply.problem)).problem == "it blocked the router and was interrupted"
        await suite.idle()
        await suite.generate(question(2))


@pytest.mark.parametrize("verb", ["PrepRecv", "RemoteSend"])
async def test_stopped_in_the_middle_of_a_move_it_leaves_nothing(verb: str) -> None:
    fleet = engines()
    fault = Fault(late=verb == "PrepRecv")
    async with running(engines=fleet, **TWICE) as suite:
        (fleet[0] if verb == "RemoteSend" else fleet[1]).faults[verb] = fault
        await make_hot(suite)
        await asyncio.wait_for(fault.reached.wait(), PATIENCE_S)
        for engine in fleet:
            engine.faults.clear()
        await suite.admin.StopPlanner(admin_pb2.StopPlannerRequest())
        reply = await planner(suite)
        assert reply.problem == "it was stopped"
        assert [move.code for move in reply.moves] == ["CANCELLED"]
        await suite.idle()


async def test_moves_that_take_too_long_are_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the planner is shown the next view."""
    monkeypatch.setattr(RouterConfig, "planner_limits", PlannerLimits(interval_s=0.01, look_s=60.0))
    carry_out, limits_s = Mover.carry_out, []

    async def in_a_hurry(mover: Mover, moves: Iterable[Move], scope: RequestScope, limit_s: float) -> None:
        limits_s.append(limit_s)
        await carry_out(mover, moves, scope, 0.1)

    monkeypatch.setattr(Mover, "carry_out", in_a_hurry)
    fleet = engines()
    fleet[0].faults["RemoteSend"] = Fault()
    async with running(engines=fleet, planner="by_topic:replicas=2") as suite:
        await make_hot(suite)
        reply = await seen(suite, lambda reply: reply.moves)
        assert reply.moves[0].code == "CANCELLED"
        looks = reply.look_count
        assert (await seen(suite, lambda reply: reply.look_count > looks)).problem == ""
        assert limits_s[0] == 30.0, "half of what the look may take"


async def test_an_engine_that_has_gone_is_no_target(tmp_path: Path) -> None:
    """The planner's view is older than the fleet."""
    path = tmp_path / "late.py"
    path.write_text(
        dedent("""
        import asyncio

        from services.router.planners import Move

        gone, seen = asyncio.Event(), asyncio.Event()


        async def planner(fleet):
            async for view in fleet.views():
                if view.topics:
                    seen.set()
                    await gone.wait()
                    here, there = view.sites
                    await fleet.carry_out([Move(view.topics[0], here, there, 256, "late")])
        """)
    )
    fleet = engines()
    async with running(engines=fleet, planner=str(path), **OFTEN) as suite:
        await make_hot(suite)
        names = suite.router.planners.library.get("late").function.__globals__
        await names["seen"].wait()
        address = sorted(engine.address for engine in fleet)[1]
        await suite.admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=address))
        names["gone"].set()
        reply = await seen(suite, lambda reply: reply.moves)
        assert (reply.moves[0].code, reply.problem) == ("NO_ENGINE", "")


# --- the tutorial's --------------------------------------------------------------------------------------------------


async def test_a_planner_in_a_file_copies_contexts_everywhere() -> None:
    fleet = engines("abc")
    async with running(engines=fleet, planner=EVERYWHERE, **OFTEN) as suite:
        await make_hot(suite)
        reply = await seen(suite, lambda reply: len(reply.moves) == 2)
        assert sorted(move.target_engine for move in reply.moves) == ["b", "c"]
        assert all(verb == "start_generate" for verb, *_ in verbs(await suite.generate(question(5))))
