"""Gives every topic engines to be at home on, as many as its traffic needs, and moves its context there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.router.planners import Move, PlannerFleet, Site, Topic, View


@dataclass(frozen=True)
class Params:
    full: float = 0.7  # how busy an engine may get before a topic needs one more
    slack: float = 0.25  # share of that by which a topic may exceed it, so that homes do not change at every turn
    replicas: int = 1  # homes that every topic has at least
    horizon_s: float = 60.0  # for how long traffic is expected to go on as it is
    gain: float = 2.0  # seconds of computing that a move must save within the horizon for each that it takes

    def __post_init__(self) -> None:
        if not 0 < self.full <= 1 or self.slack < 0 or self.replicas < 1 or not self.horizon_s > 0 or self.gain < 0:
            raise ValueError("full is in (0, 1], replicas at least 1, horizon_s positive, slack and gain not negative")


Homes = dict[Topic, list[Site]]


def find_homes(view: View, params: Params) -> Homes:
    """Topics choose in order of their traffic. One that fills an engine gets another."""
    total = sum(site.busy for site in view.sites)
    level = max(params.full, total / max(1, len(view.sites)))  # above `full` all are to be as busy as each other
    slack = params.slack * level
    room = dict.fromkeys(view.sites, level)
    homes: Homes = {}
    for topic in view.topics:
        chosen, demand = list[Site](), total * topic.rate / view.rate
        while len(chosen) < len(room) and (len(chosen) < params.replicas or demand > slack):
            others = {site: left for site, left in room.items() if site not in chosen}
            home = _best(topic, others, min(demand, level) - slack, view.homes.get(topic.name, ()))
            chosen.append(home)
            taken = min(demand, max(0.0, room[home]))
            room[home], demand = room[home] - taken, demand - taken
        homes[topic] = chosen
    return homes


def _best(topic: Topic, room: Mapping[Site, float], wanted: float, old: Collection[str]) -> Site:
    """Of those with enough room: where the topic is at home, else where most of its context is cached, else where
    there is most room."""

    def rank(site: Site) -> tuple[bool, bool, int, float]:
        return room[site] < wanted, site.address not in old, -site.cached[topic.name], -room[site]

    return min(room, key=rank)


def find_moves(view: View, homes: Homes, params: Params) -> list[Move]:
    """Contexts that are cached elsewhere and not at home, where that saves more than it costs and pushes out nothing
    that is asked for more."""
    moves: list[Move] = []
    promised = dict.fromkeys(view.sites, 0)  # pages of the topics so far, which are hotter
    for topic, at_home in homes.items():
        for site in at_home:
            source = _holder(topic, view)
            there, end = site.cached[topic.name], source.cached[topic.name] // site.page_size * site.page_size
            promised[site] += site.pages(max(there, end))
            if end <= there or not site.can_transfer or (topic.name, site.address) in view.tried:
                continue
            saved_s = params.horizon_s * topic.rate / len(at_home) * view.costs.prefill_s(site, end - there, there)
            cost_s = view.costs.send_s(source, site, end - there)
            if saved_s >= params.gain * cost_s and promised[site] + site.longest_pages <= site.usable_pages:
                why = f"saves {saved_s:.2f} s of computing in {params.horizon_s:g} s, takes {cost_s:.2f} s"
                moves.append(Move(topic, source, site, end, why))
    return moves


def _holder(topic: Topic, view: View) -> Site:
    """Who can send most of the context."""
    return max(view.sites, key=lambda site: (site.can_transfer, site.cached[topic.name]))


async def planner(fleet: PlannerFleet, params: Params) -> None:
    async for view in fleet.views():
        homes = find_homes(view, params)
        fleet.set_homes(view, homes)
        await fleet.carry_out(find_moves(view, homes, params))
