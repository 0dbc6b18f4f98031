"""When a push counts as standing still, on a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from services.kvtransfer.errors import PushStalled
from services.kvtransfer.push import AllReady, Push, PushState
from services.kvtransfer.transports.base import Capabilities, PutProgress, Reach
from services.rpc.virtual_loop import run

STALL_S = 30.0


class SlowLane:
    """One layer over a thin link: bytes arrive all the time until `stops_s`, and news come with the layer."""

    busy_s = 0.0

    def __init__(self, layer_s: float, stops_s: float, on_change: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._layer_s, self._stops_s = layer_s, stops_s
        self._loop.call_later(layer_s, on_change)

    @property
    def num_bytes(self) -> int:
        return int(min(self._loop.time(), self._stops_s))

    def post(self, layer_end: int) -> None:
        assert layer_end == 1

    def check(self) -> PutProgress:
        return PutProgress(int(self._stops_s >= self._layer_s <= self._loop.time()), self.num_bytes)

    async def finish(self) -> bool:
        return True

    async def close(self) -> None:
        pass


class SlowTransport:
    capabilities = Capabilities("slow", Reach.NETWORK)

    def __init__(self, layer_s: float, stops_s: float) -> None:
        self._times = layer_s, stops_s

    async def open(self, request: Any, on_change: Callable[[], None]) -> SlowLane:
        return SlowLane(*self._times, on_change)


class Nobody:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def push(layer_s: float, stops_s: float) -> tuple[PushState, float]:
    """How it ended, and when."""

    async def main() -> tuple[PushState, float]:
        layout = SimpleNamespace(layer_count=1)
        request: Any = SimpleNamespace(source=SimpleNamespace(shape=SimpleNamespace(layout=layout)))
        transport: Any = SlowTransport(layer_s, stops_s)
        observer: Any = Nobody()
        pushing = Push(request, (transport,), AllReady(1), STALL_S, observer)
        async for progress in pushing.updates():
            last = progress
        return last.state, asyncio.get_running_loop().time()

    return run(main())


def test_a_slow_layer_is_no_stall() -> None:
    assert push(layer_s=100.0, stops_s=100.0)[0] is PushState.COMMITTED


def test_a_layer_that_stops_in_the_middle_is_given_up() -> None:
    with pytest.raises(PushStalled):
        push(layer_s=100.0, stops_s=40.0)
