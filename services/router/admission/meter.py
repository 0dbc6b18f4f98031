"""How fast something goes while there is something to do."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

# Time after which what was seen counts half.
_HALF_LIFE_S = 5.0
_MEAN_LIFE_S = _HALF_LIFE_S / math.log(2)
# Less busy time than this says nothing.
_SHORTEST_S = 0.05
# And less than this bounds nothing: much may be done at once where nothing was done for a moment.
_SHORTEST_FLOWING_S = 1.0
# Less than this of one thing is left of what was seen long ago, which says nothing either: close to the smallest floats
# a quotient is noise.
_FEWEST = 1e-30
# While there is something to do, nobody looks less often.
_LOOK_S = 0.1
_LONGEST_BETWEEN_LOOKS_S = 2 * _LOOK_S


class Meter:
    """Units a second of busy time, recent ones counting most. Belongs to one event loop.

    Time in which that loop stood still does not count, for nothing could be done where the whole machine was stopped.
    Where only this process was, what others did meanwhile counts when it is seen: for some seconds the speed then looks
    higher than it is.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._amount = 0.0
        self._number = 0.0  # of things that make up the amount
        self._busy_s = 0.0
        self._flowing_s = 0.0  # of the busy time, without what passed before the first thing was done each time
        self._lead_s = 0.0  # that, of this time
        self._is_flowing = False
        self._busy_since: float | None = None
        self._has_timer = False  # at most one, however often there is something to do

    def set_busy(self, busy: bool) -> None:
        """Whether there is something to do from now on."""
        if busy != (self._busy_since is not None):
            self._settle()
            self._busy_since = self._clock() if busy else None
            self._is_flowing = False
            self._lead_s = 0.0
            if busy and not self._has_timer:
                self._set_timer()

    def add(self, amount: float, lead_share: float = 0.0) -> None:
        """One more thing has been done, of so many units. If it is the first, `lead_share` of the time that it took is
        as good a bound as that between others: all of it where nothing was or could have been right behind."""
        self._settle()
        self._flowing_s += lead_share * self._lead_s
        self._lead_s = 0.0
        self._is_flowing = True
        self._amount += amount
        self._number += 1

    def rate(self) -> float | None:
        """None while too little has been seen."""
        self._settle()
        if self._busy_s < _SHORTEST_S or self._number < _FEWEST:
            return None
        return self._amount / self._busy_s

    def fastest(self) -> float | None:
        """What the true rate is seldom above. None while too little has been seen.

        Of things that come by chance few may be seen where many are usual, and until the first is done it may take long
        where the others are right behind it: see add().
        """
        self._settle()
        if self._flowing_s < _SHORTEST_FLOWING_S or self._number < _FEWEST:
            return None
        # A Poisson process of which so many are expected seldom shows fewer than were seen.
        number = self._number + 2 * math.sqrt(self._number) + 3
        return self._amount / self._number * number / self._flowing_s

    def _settle(self) -> None:
        """Time fades as it passes, so that what comes out does not depend on how often this is called."""
        if self._busy_since is None:
            return
        now = self._clock()
        fading = 0.5 ** (min(now - self._busy_since, _LONGEST_BETWEEN_LOOKS_S) / _HALF_LIFE_S)
        self._amount *= fading
        self._number *= fading
        passed_s = (1 - fading) * _MEAN_LIFE_S
        self._busy_s = self._busy_s * fading + passed_s
        self._flowing_s = self._flowing_s * fading + self._is_flowing * passed_s
        self._lead_s = self._lead_s * fading + (not self._is_flowing) * passed_s
        self._busy_since = now

    def _look(self) -> None:
        self._has_timer = False
        if self._busy_since is not None:
            self._settle()
            self._set_timer()

    def _set_timer(self) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(_LOOK_S, self._look)
