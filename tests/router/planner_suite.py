"""What tests of planners share: a context that becomes hot, and looks at the planner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from microserve.router.v1 import admin_pb2

from services.rpc.status import from_rpc_error
from tests.fakes import FakeEngine
from tests.router.harness import PATIENCE_S, Running, model

CONTEXT = tuple(range(3, 259))  # 256 tokens: four blocks, 64 pages
PAGES = len(CONTEXT) // 4
OFTEN = {"planner_interval": 0.01}
TWICE = {"planner": "by_topic:replicas=2", **OFTEN}


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
