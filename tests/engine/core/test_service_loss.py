"""The KV transfer service dies: what is not whole ends, the rest goes on (rule 9)."""

from __future__ import annotations

import pytest

from services.engine.core import api
from services.protocol.errors import Code, ServiceError
from services.protocol.timing import Timing
from tests.engine.core.test_transfer import generate, send
from tests.engine.core.world import World, events, prompt_of

PROMPT = prompt_of(20)


@pytest.mark.parametrize("side", ["p", "d"])
@pytest.mark.parametrize("num_events", [0, 2, 5, 9, 14, 30])
def test_the_death_of_a_transfer_service(side: str, num_events: int) -> None:
    world, prompt = World(max_step_tokens=8), PROMPT
    world.network.moves_at_once = False
    reserved = world.reserve(prompt, 19)
    whole = world.reserve(prompt_of(12, start=2), 12)
    send(world, prompt_of(12, start=2), whole)
    sent = world.p.remote_send(prompt, 0, 19, reserved)
    stream = generate(world, prompt, reserved)
    happening = events(world)
    for _ in range(num_events):
        next(happening)
    node = world.p if side == "p" else world.d
    node.service.crash()
    world.run()
    assert not sent.is_open
    if sent.values and isinstance(sent.values[0], Timing):
        assert stream.tokens == world.d.expected(prompt, 3)
    elif side == "d":
        assert stream.failure.code is Code.ABORTED
    else:
        assert sent.error.code is Code.UNAVAILABLE
    refused = node.prep_recv(prompt, 19)
    world.run()
    assert refused.error.reason == "KVTRANSFER_GONE"
    again = generate(world, prompt_of(12, start=2), whole)
    world.run()
    assert again.tokens == world.d.expected(prompt_of(12, start=2), 3), "what was filled goes on"
    node.service.announce()
    fresh = world.reserve(prompt_of(9, start=4), 9)
    send(world, prompt_of(9, start=4), fresh)
    stream = generate(world, prompt_of(9, start=4), fresh)
    world.clock.now += 30.0
    world.run()
    world.assert_idle()


def test_a_grant_that_fails_fails_the_call() -> None:
    world = World()
    world.d.service.grant = lambda spec: world.d.inbox.append(  # type: ignore[method-assign]
        api.GrantFailed(spec.reservation_id, ServiceError("no"))
    )
    answer = world.d.prep_recv(PROMPT, 19)
    world.run()
    assert answer.error.message == "no"
    world.assert_idle()
