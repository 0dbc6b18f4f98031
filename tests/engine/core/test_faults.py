"""Fault points are passed in order, and a failure there is answered."""

from __future__ import annotations

import pytest

from services.protocol.errors import Code
from tests.engine.core.test_transfer import generate, send
from tests.engine.core.world import World, prompt_of

PROMPT = prompt_of(20)


def test_fault_points_hold_fail_and_are_passed() -> None:
    passed: list[str] = []

    class Recording:
        def reach(self, point: str) -> None:
            if not point.startswith("step"):
                passed.append(point)

    world = World(faults=Recording())
    reserved = world.reserve(PROMPT, 19)
    send(world, PROMPT, reserved)
    generate(world, PROMPT, reserved)
    world.run()
    layers = [f"send.layer.{layer}" for layer in range(3)]
    assert passed == [
        "prep_recv.begin", "prep_recv.end", "remote_send.begin", *layers, *layers, "remote_send.end",
        "start_generate.begin", "start_generate.end",
    ]  # fmt: skip


@pytest.mark.parametrize("point", ["prep_recv.begin", "remote_send.begin", "send.layer.1", "start_generate.begin"])
def test_a_failure_at_a_point_is_answered(point: str) -> None:
    armed = [point]

    class Failing:
        def reach(self, point: str) -> None:
            if point in armed:
                armed.clear()
                raise RuntimeError("injected")

    world = World(faults=Failing())
    prep = world.d.prep_recv(PROMPT, 19)
    world.run()
    if point == "prep_recv.begin":
        assert prep.error.code is Code.INTERNAL
        return
    sent = world.p.remote_send(PROMPT, 0, 19, prep.value)
    world.run()
    if point in ("remote_send.begin", "send.layer.1"):
        assert sent.error.code is Code.INTERNAL
    stream = generate(world, PROMPT, prep.value)
    world.run()
    if point == "start_generate.begin":
        assert stream.failure.code is Code.INTERNAL
    world.clock.now += 60.0
    world.run()
    world.assert_idle()
