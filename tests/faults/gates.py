"""Gates at the layer boundaries of a send and before steps: a test closes one, sees an engine arrive, does something,
and opens it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc

T = TypeVar("T")
# Between two passes of an engine, the first time, and how much longer every other time: where others are slow, a
# hundred steps of this one must not come too soon for them.
_PASS_S, _LONGER = 0.05, 1.2
# As long may an engine take to come to a gate: one that is dead, or has nothing to do, never comes.
_COME_S = 120.0
# Deadlines of calls, the last of which is long enough on any machine.
_DEADLINES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Gate:
    """Closed: the engine that comes here stands still."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None
        self._coming: asyncio.Future[int] | None = None

    async def reached(self) -> None:
        """Returns when an engine stands here. TimeoutError if none comes."""
        await self._stands_before(asyncio.get_running_loop().create_future())

    async def reached_before(self, end: asyncio.Future[Any]) -> bool:
        """Whether an engine stands here before `end` is done; returns when it is known."""
        if self._held is None:
            if self._coming is None:
                # Blocks until the engine opens its end: that is the event.
                self._coming = asyncio.ensure_future(asyncio.to_thread(os.open, self._path, os.O_WRONLY))
            await asyncio.wait({self._coming, end}, return_when=asyncio.FIRST_COMPLETED)
            if not self._coming.done():
                return False
            self._held, self._coming = self._coming.result(), None
        return True

    async def with_deadline(
        self,
        begin: Callable[[float], Coroutine[Any, Any, grpc.StatusCode]],
        too_soon: Collection[grpc.StatusCode] = (grpc.StatusCode.DEADLINE_EXCEEDED,),
    ) -> asyncio.Future[grpc.StatusCode]:
        """A call that an engine stands here for when its deadline passes. `begin` makes one with a deadline in so many
        seconds; where that was too soon to come here, another one with twice as many. AssertionError if a call ends
        otherwise before an engine stands here, or if none ever does."""
        for timeout_s in _DEADLINES_S:
            call = asyncio.ensure_future(begin(timeout_s))
            if await self.reached_before(call):
                return call
            code = await call
            assert code in too_soon, f"{code} before an engine came to the gate"
        raise AssertionError(f"no engine came to the gate in {timeout_s:g} s")

    async def until(self, event: Awaitable[T]) -> T:
        """Lets the engine pass one time after the other until that has happened, and an engine stands here again.

        In no hurry: where others are slow, for which the event waits too, this one has hardly gone on. Raises what the
        event raises, and TimeoutError if neither it nor an engine comes.
        """
        waiting, pass_s = asyncio.ensure_future(event), _PASS_S
        try:
            while await self._stands_before(waiting) and not (await asyncio.wait({waiting}, timeout=pass_s))[0]:
                pass_s *= _LONGER
                _put_fifo(self._path)  # another one, which the engine has never opened
                self._let_go()
            result = await waiting
        finally:
            waiting.cancel()
        await self.reached()
        return result

    async def _stands_before(self, end: asyncio.Future[Any]) -> bool:
        """As reached_before, within the time that an engine may take. TimeoutError."""
        async with asyncio.timeout(_COME_S):
            return await self.reached_before(end)

    def open(self) -> None:
        """Lets it go on, and everybody after it. Again is no error."""
        if self._coming is not None:
            # Nobody came. The thread that waits must not wait for ever: with a reader it ends.
            reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            self._coming.add_done_callback(partial(_close, reader))
            self._coming = None
        if self._path.is_fifo():
            _put_file(self._path)
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None


class LayerGates:
    """One gate a layer, all open at first. Several engines may share them, if one sends at a time."""

    def __init__(self, folder: Path, layer_count: int) -> None:
        folder.mkdir()
        self._paths = [folder / f"layer-{layer}" for layer in range(layer_count)]
        for path in self._paths:
            _put_file(path)

    @property
    def options(self) -> list[str]:
        """Command line of an engine that passes these gates."""
        return ["--fault-points", ",".join(f"send.layer.{i}=hold:{path}" for i, path in enumerate(self._paths))]

    @contextmanager
    def closed(self, layer: int) -> Iterator[Gate]:
        """Inside, the gate behind `layer` is closed until it is opened."""
        with _closed(self._paths[layer]) as gate:
            yield gate


class StepGate:
    """A gate before every step of one engine, open at first: closed, it keeps a sequence from ending too soon."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _put_file(path)

    @property
    def options(self) -> tuple[str, str]:
        """Command line of the engine."""
        return "--fault-points", f"step.begin=hold:{self._path}"

    @contextmanager
    def closed(self) -> Iterator[Gate]:
        """Inside, the gate is closed until it is opened."""
        with _closed(self._path) as gate:
            yield gate


def _close(reader: int, coming: asyncio.Future[int]) -> None:
    """Both ends of a FIFO that no engine came to."""
    os.close(reader)
    if not coming.cancelled():
        os.close(coming.result())


@contextmanager
def _closed(path: Path) -> Iterator[Gate]:
    _put_fifo(path)
    gate = Gate(path)
    try:
        yield gate
    finally:
        gate.open()


def _put_fifo(path: Path) -> None:
    """Who comes to it waits; in one step, too."""
    new = path.with_suffix(".closed")
    os.mkfifo(new)
    new.replace(path)


def _put_file(path: Path) -> None:
    """An empty file is read to its end at once; it takes the place of what stood there in one step."""
    new = path.with_suffix(".open")
    new.touch()
    new.replace(path)
