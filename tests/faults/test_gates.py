"""Gates without engines: whoever reads the file behind one comes to it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import pytest

from services.engine.core.faults import ScriptedFaults
from tests.faults import gates
from tests.faults.gates import StepGate

CODES = grpc.StatusCode


async def test_a_deadline_that_was_too_soon_is_doubled(tmp_path: Path) -> None:
    path, tried = tmp_path / "gate", []

    async def begin(timeout_s: float) -> grpc.StatusCode:
        tried.append(timeout_s)
        if len(tried) < 3:
            return CODES.DEADLINE_EXCEEDED
        await asyncio.to_thread(path.read_bytes)
        return CODES.OK

    with StepGate(path).closed() as gate:
        call = await gate.with_deadline(begin)
        assert not call.done()
    assert await call is CODES.OK
    assert tried == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("code", [CODES.OK, CODES.UNAVAILABLE])
async def test_a_call_that_ends_otherwise_before_the_gate_is_told_of_at_once(
    tmp_path: Path, code: grpc.StatusCode
) -> None:
    tried = []

    async def begin(timeout_s: float) -> grpc.StatusCode:
        tried.append(timeout_s)
        return code

    with StepGate(tmp_path / "gate").closed() as gate, pytest.raises(AssertionError, match=code.name):
        await gate.with_deadline(begin)
    assert tried == [1.0]


async def test_a_call_that_cannot_be_made_is_told_of_at_once(tmp_path: Path) -> None:
    async def begin(timeout_s: float) -> grpc.StatusCode:
        raise ValueError(f"not in {timeout_s:g} s")

    with StepGate(tmp_path / "gate").closed() as gate, pytest.raises(ValueError, match="not in 1 s"):
        await gate.with_deadline(begin)


async def test_a_gate_that_no_deadline_is_long_enough_for_is_given_up(tmp_path: Path) -> None:
    tried = []

    async def begin(timeout_s: float) -> grpc.StatusCode:
        tried.append(timeout_s)
        return CODES.ABORTED

    with StepGate(tmp_path / "gate").closed() as gate, pytest.raises(AssertionError, match=r"no engine .* in 64 s"):
        await gate.with_deadline(begin, too_soon=(CODES.ABORTED,))
    assert tried == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


async def test_passes_until_the_event_and_then_stands_again(tmp_path: Path) -> None:
    path, passes, third = tmp_path / "gate", [], asyncio.Event()

    async def engine() -> None:
        while len(passes) < 10:
            passes.append(await asyncio.to_thread(path.read_bytes))
            if len(passes) == 3:
                third.set()

    with StepGate(path).closed() as gate:
        running = asyncio.create_task(engine())
        assert await gate.until(third.wait())
        assert 3 <= len(passes) < 10
        assert not running.done()
    await running


async def test_an_event_that_fails_is_told_of_though_nobody_comes(tmp_path: Path) -> None:
    async def fail() -> None:
        raise ValueError("gone")

    with StepGate(tmp_path / "gate").closed() as gate, pytest.raises(ValueError, match="gone"):
        await gate.until(fail())


async def test_an_event_that_fails_is_told_of_though_the_engine_never_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "gate"

    async def come_once() -> None:
        await asyncio.to_thread(path.read_bytes)
        raise ValueError("died")

    with StepGate(path).closed() as gate, pytest.raises(ValueError, match="died"):
        await gate.until(come_once())


async def test_waiting_for_an_engine_that_never_comes_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_COME_S", 0.01)
    never = asyncio.Event()
    with StepGate(tmp_path / "gate").closed() as gate:
        with pytest.raises(TimeoutError):
            await gate.reached()
        with pytest.raises(TimeoutError):
            await gate.until(never.wait())


async def test_a_gate_that_nobody_came_to_keeps_no_thread(tmp_path: Path) -> None:
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    ended.set_result(None)
    with StepGate(tmp_path / "gate").closed() as gate:
        assert not await gate.reached_before(ended)
        waiting = gate._coming
        assert waiting is not None
        assert not waiting.done()
    await asyncio.wait_for(waiting, 60)
    assert (tmp_path / "gate").read_bytes() == b""


async def test_an_engine_goes_on_when_the_gate_where_it_stands_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    engine = ScriptedFaults({"step.begin": f"hold:{path}"})
    with StepGate(path).closed():
        passing = asyncio.create_task(asyncio.to_thread(engine.reach, "step.begin"))
        # Somebody whom the gate does not know has it stand here, for as long as he likes.
        other = await asyncio.to_thread(os.open, path, os.O_WRONLY)
        assert not passing.done()
    try:
        await asyncio.wait_for(passing, 60)
    finally:
        os.close(other)
