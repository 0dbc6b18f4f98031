"""How many requests may be under way at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from services.router.errors import Overloaded
from services.router.metrics import REQUESTS_IN_FLIGHT

_RETRY_S = 1.0


class Admission:
    """Refuses at once what is too much: a queue here would only turn overload into latency."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._num_requests = 0

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Counts a request for as long as the block runs. Overloaded."""
        if self._num_requests >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are under way", retry_delay_s=_RETRY_S)
        self._num_requests += 1
        REQUESTS_IN_FLIGHT.inc()
        try:
            yield
        finally:
            self._num_requests -= 1
            REQUESTS_IN_FLIGHT.dec()
