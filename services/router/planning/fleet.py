"""What a planner works with: views of the fleet, moves, homes, and the engines with their verbs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from services.router.cleanup import Cleanup
from services.router.errors import PolicyFailed
from services.router.fleet.homes import GRAIN, Homes
from services.router.fleet.scope import RequestScope
from services.router.fleet.view import Engine
from services.router.metrics import PLANNER_LOOKS, PLANNER_TOPICS
from services.router.planning.mover import Mover
from services.router.planning.observer import Observer
from services.router.planning.topics import Topic
from services.router.planning.view import Move, Site, View


class PlannerFleet:
    """For one run of a planner. What it leaves open on engines between two looks is released, and ends it."""

    def __init__(
        self,
        observer: Observer,
        mover: Mover,
        homes: Homes,
        cleanup: Cleanup,
        *,
        interval_s: float,
        look_s: float,
        on_turn: Callable[[bool], None],
    ) -> None:
        """`look_s`: what a look may take, its moves half of it. `on_turn` hears when the planner has its turn, and
        when it has given it back."""
        self.num_looks = 0
        self._observer = observer
        self._mover = mover
        self._homes = homes
        self._cleanup = cleanup
        self._interval_s = interval_s
        self._look_s = look_s
        self._on_turn = on_turn
        self._scope = RequestScope(cleanup)
        self._over = False

    async def views(self) -> AsyncIterator[View]:
        """Every few seconds a view of each model that is served, until the planner is stopped."""
        while True:
            self._on_turn(False)
            await self._end_look()
            await asyncio.sleep(self._interval_s)
            views = await self._observer.look(self._mover.tried(), self._look_s)
            self.num_looks += 1
            PLANNER_LOOKS.inc()
            PLANNER_TOPICS.set(sum(len(view.topics) for view in views))
            self._on_turn(True)
            for view in views:
                yield view

    def set_homes(self, view: View, homes: Mapping[Topic, Sequence[Site]]) -> None:
        """Where the topics of a view's model are at home from now on, in place of all that was said of it before."""
        if self._over:
            raise PolicyFailed("the planner is over")
        addresses = {
            topic.context.block_hashes(GRAIN)[-1]: tuple(site.address for site in sites)
            for topic, sites in homes.items()
            if sites
        }
        self._homes.set(view.model, addresses)

    async def carry_out(self, moves: Iterable[Move]) -> None:
        """Moves contexts, the first first, as far as the budgets allow; returns when all have ended. Failures are
        recorded, not raised."""
        await self._mover.carry_out(moves, self._scope, self._look_s / 2)

    def engine(self, site: Site) -> Engine:
        """The engine as policies see it, for a planner that calls verbs itself. NoEngine if it has been removed."""
        return self._mover.engine(site, self._scope)

    async def close(self) -> None:
        """Nothing can be begun any more; what is open is released."""
        self._over = True
        await self._scope.close()

    async def _end_look(self) -> None:
        scope, self._scope = self._scope, RequestScope(self._cleanup)
        left = await scope.close()
        if self._over or left:
            await self.close()
            raise PolicyFailed(f"the planner left {left} open" if left else "the planner is over")
