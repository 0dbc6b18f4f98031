"""Copies every context that is asked for often to every engine."""

from services.router.planners import Move


async def planner(fleet):
    async for view in fleet.views():
        for topic in view.topics:
            holder = max(view.sites, key=lambda site: site.cached[topic.name])
            others = [site for site in view.sites if site.cached[topic.name] < holder.cached[topic.name]]
            tokens = holder.cached[topic.name]
            await fleet.carry_out([Move(topic, holder, site, tokens, "everywhere") for site in others])
