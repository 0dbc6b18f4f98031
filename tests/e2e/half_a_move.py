"""Moves the first half of a context, and then waits for ever with the reservation in its hands."""

import asyncio

from services.router.planners import PlannerFleet
from services.router.policies import TokenRange


async def planner(fleet: PlannerFleet) -> None:
    async for view in fleet.views():
        for topic in view.topics:
            target, *_, source = sorted(view.sites, key=lambda site: site.cached[topic.name])
            async with fleet.engine(target).prep_recv(topic.context, end=topic.tokens) as kv:
                await fleet.engine(source).remote_send(topic.context, kv, TokenRange(0, topic.tokens // 2))
                await asyncio.Event().wait()
