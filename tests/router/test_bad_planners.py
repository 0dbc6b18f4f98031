"""What becomes of planners that fail, and of moves that are broken off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent, indent

import pytest
from microserve.router.v1 import admin_pb2
from prometheus_client import REGISTRY

from services.router.config import RouterConfig
from services.router.fleet.scope import RequestScope
from services.router.planning.host import PlannerLimits
from services.router.planning.mover import Mover
from services.router.planning.topics import TopicLimits
from services.router.planning.view import Move
from services.router.programs.watchdog import WatchdogLimits
from tests.fakes import Fault
from tests.router.harness import PATIENCE_S, running
from tests.router.planner_suite import OFTEN, TWICE, engines, make_hot, planner, question, seen, start

LATE = "it did not ask for the next view within 0.2 s"
RESERVE = "fleet.engine(min(view.sites, key=lambda site: site.name)).prep_recv(view.topics[0].context, end=256)"
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
        "it raised PolicyFailed: the planner left prep_recv on a open",
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
