"""How planners are started, swapped, uploaded and refused."""

from __future__ import annotations

import asyncio

import pytest
from microserve.router.v1 import admin_pb2

from services.protocol.errors import ServiceError
from services.router.app import Router
from services.router.config import RouterConfig
from tests.router.harness import failing, model, running
from tests.router.planner_suite import OFTEN, planner, question, seen, start

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
    async with running(takes_uploads=True, **OFTEN) as suite:
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
    async with running(takes_uploads=True, **OFTEN, planner="by_topic") as suite:
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
