"""The link between two nodes is cut and healed at each layer boundary, or is slow, while a third engine streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.e2e.network import Link, Network, two_nodes
from tests.e2e.suite import generate
from tests.e2e.test_two_nodes import start_two
from tests.faults.gates import Gate, LayerGates
from tests.faults.test_layer_boundaries import (
    CODES,
    LAYER_COUNT,
    PROMPT,
    Scene,
    at_each_boundary,
    undisturbed,
)
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults


@asynccontextmanager
async def apart(tmp_path: Path, network: Network) -> AsyncIterator[Scene]:
    """The sender on one node; the receiver and the bystander on the other, at one transfer service."""
    model = make_tiny_llama(tmp_path / "model", layers=LAYER_COUNT)
    gates = LayerGates(tmp_path / "gates", LAYER_COUNT)
    lease = ["--lease-default", "2"]
    options = {0: [*lease, *gates.options], 1: lease, 2: lease}
    async with start_two(model, network, policy=None, num_engines=3, options_of=options) as nodes:
        expected = (await generate(nodes.suite, nodes.suite.engines[2], PROMPT, salt="expected")).token_ids
        yield Scene(nodes.suite, gates, model, expected)


async def test_the_link_is_cut_until_the_peer_is_lost(tmp_path: Path) -> None:
    with two_nodes() as network:
        async with apart(tmp_path, network) as s:

            async def fault(gate: Gate, salt: str) -> None:
                prepared = await s.prepare(salt)
                sending = s.send(prepared, salt, 20)
                await gate.reached()
                network.cut()
                gate.open()
                # The last layer may have been in place before.
                assert await sending in (CODES.UNAVAILABLE, CODES.OK)
                await s.give_up(prepared)
                await s.pair_idle()
                network.heal()

            await at_each_boundary(s, fault)


async def test_the_link_is_down_when_the_services_would_meet(tmp_path: Path) -> None:
    """Connecting fails at once: the sender hears of it and may try elsewhere, and later they meet."""
    with two_nodes() as network:
        async with apart(tmp_path, network) as s:
            prepared = await s.prepare("apart")
            network.cut()
            async with undisturbed(s):
                assert await s.send(prepared, "apart", 20) is CODES.UNAVAILABLE
            await s.give_up(prepared)
            network.heal()
            await s.check_transfer("together")
            await s.everything_back()


async def test_the_link_is_cut_for_a_moment(tmp_path: Path) -> None:
    """Nobody whose services have met hears of it: the kernels send again what was lost."""
    with two_nodes() as network:
        async with apart(tmp_path, network) as s:
            await s.check_transfer("meeting")

            async def fault(gate: Gate, salt: str) -> None:
                prepared = await s.prepare(salt)
                sending = s.send(prepared, salt, 20)
                await gate.reached()
                with network.cut_for(0.3):
                    gate.open()
                assert await sending is CODES.OK
                await s.check_receiver(prepared, salt)

            await at_each_boundary(s, fault)


async def test_the_link_is_slow(tmp_path: Path) -> None:
    """It takes longer than the lease, which writes renew in half that time; no timeout takes it for a fault."""
    lease_s = 8.0
    with two_nodes(Link(bits_per_second=160_000)) as network:
        async with apart(tmp_path, network) as s, undisturbed(s):
            prepared = await s.prepare("slow", lease_s)
            begin = time.monotonic()
            assert await s.send(prepared, "slow", 120) is CODES.OK
            assert time.monotonic() - begin > lease_s
            await s.check_receiver(prepared, "slow")
            await s.pair_idle()
