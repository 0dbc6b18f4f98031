"""Gates without engines: whoever reads the file behind one comes to it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.faults.gates import StepGate


async def test_a_deadline_that_was_too_soon_is_doubled(tmp_path: Path) -> None:
    path, tried = tmp_path / "gate", []

    async def begin(timeout_s: float) -> bytes:
        tried.append(timeout_s)
        return await asyncio.to_thread(path.read_bytes) if len(tried) == 3 else b"too soon"

    with StepGate(path).closed() as gate:
        call = await gate.with_deadline(begin)
        assert not call.done()
    assert await call == b""
    assert tried == [1.0, 2.0, 4.0]


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
