"""Engines on two nodes, each with its own transfer service, which move KV over a network."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from microserve.engine.v1 import engine_pb2 as engine
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.kvtransfer.v1 import kvtransfer_pb2 as kvtransfer
from microserve.kvtransfer.v1.kvtransfer_pb2_grpc import KvTransferServiceStub
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from microserve.types.v1 import kv_pb2 as kv

from services.cli.client import wait_serving
from services.cli.fleet import Fleet
from tests.e2e.errors import failing
from tests.e2e.network import Link, Network, Node, two_nodes
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    Engine,
    Suite,
    ask,
    channel,
    generate,
    idle,
    prep_recv,
    remote_send,
    router_sees,
    wait_for_load,
)
from tests.e2e.waiting import until
from tests.faults.gates import LayerGates
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

PAGES = ["--kv-memory-mib", "32", "--poison-pages"]
# A test that renews it may stand still for nearly as long.
LEASE = duration_pb2.Duration(seconds=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


class TwoNodes:
    """A suite whose engines 0 and 1 are on different nodes."""

    def __init__(self, suite: Suite, far: KvTransferServiceStub, network: Network | None) -> None:
        self.suite, self._far, self._network = suite, far, network

    @property
    def network(self) -> Network:
        assert self._network is not None
        return self._network

    async def stats(self) -> tuple[kvtransfer.GetStatsResponse, kvtransfer.GetStatsResponse]:
        near, far = [await stub.GetStats(kvtransfer.GetStatsRequest()) for stub in (self.suite.transfer, self._far)]
        return near, far

    async def has_received(self) -> bool:
        """Whether the second node's pools took in a byte."""
        return any(pool.received_bytes for pool in (await self.stats())[1].pools)


@asynccontextmanager
async def start_two(
    model: Path,
    network: Network | None,
    *,
    checksums: bool = False,
    policy: str | None = "disaggregated",
    num_engines: int = 2,
    options_of: Mapping[int, Sequence[str]] | None = None,
) -> AsyncIterator[TwoNodes]:
    """One transfer service a node, the first engine on the first, all others on the second; the router outside.
    Without a network, all on one host."""
    os.environ["MICROSERVE_TESTING"] = "1"
    nodes = (network.first, network.second) if network is not None else (None, None)
    with (
        Fleet() as near,
        Fleet(within=nodes[0].within if nodes[0] else ()) as one,
        Fleet(within=nodes[1].within if nodes[1] else ()) as two,
    ):
        transfers = []
        for fleet, node in zip((one, two), nodes, strict=True):
            inside = node.inside if node else "127.0.0.1"
            options = ["--data-listen", f"{inside}:0", *(["--checksums"] if checksums else [])]
            listen = "0.0.0.0:0" if node else "127.0.0.1:0"
            transfer = fleet.start_kvtransfer(listen=listen, extra=["--advertise", inside, *options])
            port = transfer.address.rpartition(":")[2]
            transfers.append((transfer, KvTransferServiceStub(channel(f"{_outside(node)}:{port}"))))
        engines = []
        for index in range(num_engines):
            at = min(index, 1)
            listen, extra = f"{_outside(nodes[at])}:0", [*PAGES, *(options_of or {}).get(index, ())]
            engines.append(
                (one, two)[at].start_engine(f"engine-{index}", model, transfers[at][0], listen=listen, extra=extra)
            )
        suite = Suite(near, transfers[0][0], transfers[0][1], [], [])
        for process in engines:
            suite.engines.append(Engine(process, EngineServiceStub(suite.connect(process.address))))
        if policy is not None:
            suite.router_process = near.start_router(engines, policy)
            front = suite.connect(suite.router_process.address)
            suite.router, suite.admin = RouterServiceStub(front), AdminServiceStub(front)
            await wait_serving(suite.router_process.address, 120)
            await router_sees(suite, num_engines)
        try:
            yield TwoNodes(suite, transfers[1][1], network)
        finally:
            for open_channel in suite.channels:
                await open_channel.close()


def _outside(node: Node | None) -> str:
    return node.outside if node else "127.0.0.1"


async def same_tokens(nodes: TwoNodes, longest: int) -> None:
    """Disaggregated over the network equals one engine, in both directions, and every byte went by tcp."""
    suite = nodes.suite
    for number, prompt in enumerate(mixed_prompts(6, 512, longest)):
        alone = await generate(suite, suite.engines[0], prompt, salt="alone")
        answer = await ask(suite, prompt, "disaggregated", salt=f"moved-{number}")
        assert answer.token_ids == alone.token_ids
    sender, receiver = suite.engines
    prompt = mixed_prompts(10, 512, longest, seed=9)[-1]
    for first, second in ((sender, receiver), (receiver, sender)):
        reservation = await prep_recv(suite, second, prompt, len(prompt) - 1, cache_salt=first.name)
        await remote_send(suite, first, prompt, reservation.address, cache_salt=first.name)
        moved = await generate(suite, second, prompt, address=reservation.address, salt=first.name)
        alone = await generate(suite, second, prompt, salt=f"{first.name}-alone")
        assert moved.token_ids == alone.token_ids
    for stats in await nodes.stats():
        by_name = {transport.name: transport for transport in stats.transports}
        assert by_name["tcp"].bytes > 0
        assert by_name["shm"].bytes == 0
        (link,) = stats.links
        assert (link.transport, link.fallback_count) == ("tcp", 0)
        assert [speed.transport for speed in link.speeds] == ["tcp"]
        assert link.speeds[0].bytes_per_second > 0
    for each in suite.engines:
        await wait_for_load(each, idle)


async def test_two_services_on_one_host(model: Path) -> None:
    async with start_two(model, None, checksums=True) as nodes:
        await same_tokens(nodes, 300)


async def test_two_nodes(model: Path) -> None:
    with two_nodes() as network:
        async with start_two(model, network) as nodes:
            await same_tokens(nodes, 300)


async def test_a_link_with_delay_and_loss(model: Path) -> None:
    with two_nodes(Link(delay_s=0.01, loss=0.02)) as network:
        async with start_two(model, network) as nodes:
            await same_tokens(nodes, 120)


async def renewed(at: Engine, address: kv.KvAddress) -> None:
    """Keeps a short lease from running out."""
    reservation = engine.ReservationRef(reservation_id=address.reservation_id, secret=address.secret)
    while True:
        await at.stub.Renew(engine.RenewRequest(reservation=reservation, lease=LEASE))
        await asyncio.sleep(LEASE.seconds / 10)


async def test_a_link_that_is_cut_and_heals(model: Path, tmp_path: Path) -> None:
    """Both sides hear of it within the deadline, every page comes back, and the next transfer works."""
    gates = LayerGates(tmp_path / "gates", 2)
    with two_nodes(Link(bits_per_second=400_000)) as network:
        async with start_two(model, network, policy=None, options_of={0: gates.options}) as nodes:
            suite = nodes.suite
            sender, receiver = suite.engines
            prompt: Sequence[int] = mixed_prompts(10, 512, 600)[-1]
            reservation = await prep_recv(suite, receiver, prompt, 600, cache_salt="cut", lease_s=LEASE.seconds)
            renewing = asyncio.create_task(renewed(receiver, reservation.address), name="renew")
            # The sender stands behind its second layer, so that not all is there before the link is cut.
            with gates.closed(1) as gate:
                sending = asyncio.create_task(
                    remote_send(suite, sender, prompt, reservation.address, cache_salt="cut"), name="send"
                )
                await gate.reached()
                await until(nodes.has_received, True)
                assert not sending.done()
                network.cut()
            begin = asyncio.get_running_loop().time()
            with failing(grpc.StatusCode.UNAVAILABLE, "PEER_LOST"):
                await sending
            assert asyncio.get_running_loop().time() - begin < 15  # three times the silence that means a peer is lost
            assert not renewing.done()
            renewing.cancel()
            again = await prep_recv(suite, receiver, prompt, 600, cache_salt="still-cut", lease_s=LEASE.seconds)
            with failing(grpc.StatusCode.UNAVAILABLE):
                await remote_send(suite, sender, prompt, again.address, cache_salt="still-cut")
            # Leases, and the receiver's own deadline, give everything back.
            await wait_for_load(sender, idle)
            await wait_for_load(receiver, idle)
            network.heal()
            short = prompt[:40]
            async with asyncio.timeout(60):
                reservation = await prep_recv(suite, receiver, short, 39, cache_salt="healed")
                await remote_send(suite, sender, short, reservation.address, cache_salt="healed")
                moved = await generate(suite, receiver, short, address=reservation.address, salt="healed")
            assert moved.token_ids == (await generate(suite, receiver, short, salt="alone")).token_ids
