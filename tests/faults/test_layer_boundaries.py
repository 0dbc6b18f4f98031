"""Each process of a transfer is killed or stopped at each layer boundary, within one service and between two.

Every time: the caller has a typed answer before its deadline, all pages come back, a third engine's stream goes on as
if nothing were, the tokens that follow are right, and whoever replaces a killed process serves in the same fleet.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import pytest
from microserve.engine.v1 import engine_pb2 as engine
from microserve.router.v1 import router_pb2 as router
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub

from services.cli.client import wait_serving
from tests.e2e.errors import failing, outcome
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import (
    LEASE_S,
    Engine,
    Suite,
    ask,
    generate,
    give_up,
    idle,
    prep_recv,
    remote_send,
    router_sees,
    start_suite,
    wait_for_load,
)
from tests.faults.gates import Gate, LayerGates
from tests.faults.test_cancels_and_deadlines import drain
from tests.faults.test_kills import replace, until_it_works
from tests.models import make_tiny_llama

pytestmark = pytest.mark.faults

each_transport = pytest.mark.parametrize("transport", ["shm", "tcp"])
# Engine 0, which sends, belongs to the first transfer service; engine 1 to the second, if there are two.
each_service = pytest.mark.parametrize(
    ("transport", "index"), [("shm", 0), ("tcp", 0), ("tcp", 1)], ids=["shm", "tcp-sending", "tcp-receiving"]
)

PROMPT = mixed_prompts(10, 500, 300)[-1]
END = len(PROMPT) - 1
LAYER_COUNT = 3
CODES = grpc.StatusCode


@dataclass
class Scene:
    """Three engines of one suite; the third only ever talks to itself."""

    suite: Suite
    gates: LayerGates
    model: Path
    expected: list[int]
    turn: int = 0

    @property
    def sender(self) -> Engine:
        return self.suite.engines[0]

    @property
    def receiver(self) -> Engine:
        return self.suite.engines[1]

    @property
    def bystander(self) -> Engine:
        return self.suite.engines[2]

    async def prepare(self, salt: str, lease_s: float = LEASE_S) -> engine.PrepRecvResponse:
        """A reservation for all of the prompt but its last token, once the receiver can reach its service."""
        return await until_it_works(
            lambda: prep_recv(self.suite, self.receiver, PROMPT, END, lease_s=lease_s, cache_salt=salt)
        )

    def send(
        self, prepared: engine.PrepRecvResponse, salt: str, timeout_s: float, attempt: int = 1
    ) -> asyncio.Future[grpc.StatusCode]:
        request = engine.RemoteSendRequest(
            owner_id="test",
            request_id=self.suite.new_id(),
            prompt_token_ids=PROMPT,
            range=prepared.address.window,
            address=prepared.address,
            cache_salt=salt,
            attempt=attempt,
        )
        return asyncio.ensure_future(outcome(self.sender.stub.RemoteSend(request, timeout=timeout_s)))

    async def give_up(self, prepared: engine.PrepRecvResponse) -> None:
        """A reservation that failed is not used."""
        await give_up(self.receiver, prepared)

    async def check_receiver(self, prepared: engine.PrepRecvResponse, salt: str) -> None:
        """The reservation is filled with the right KV."""
        result = await generate(self.suite, self.receiver, PROMPT, address=prepared.address, salt=salt)
        assert result.token_ids == self.expected
        # All but the last token arrived from the peer.
        assert result.timing.computed_token_count == 1

    async def check_transfer(self, salt: str) -> None:
        """A whole transfer from the sender to the receiver works."""
        prepared = await self.prepare(salt)
        await until_it_works(lambda: remote_send(self.suite, self.sender, PROMPT, prepared.address, cache_salt=salt))
        await self.check_receiver(prepared, salt)

    async def everything_back(self) -> None:
        """No engine holds anything."""
        await self.pair_idle()
        await wait_for_load(self.bystander, idle)

    async def pair_idle(self) -> None:
        """Sender and receiver hold nothing."""
        for at in (self.sender, self.receiver):
            await wait_for_load(at, idle)

    async def replace(self, index: int) -> None:
        """A new engine under the name and the address of a killed one."""
        await replace(
            self.suite, index, self.model, ["--lease-default", "2", *(self.gates.options if not index else ())]
        )


@asynccontextmanager
async def scene(tmp_path: Path, transport: str, policy: str | None = None) -> AsyncIterator[Scene]:
    model = make_tiny_llama(tmp_path / "model", layers=LAYER_COUNT)
    gates = LayerGates(tmp_path / "gates", LAYER_COUNT)
    # A router may make any engine the sender; by hand it is always the first, and the third can send past the gates.
    gated = range(3) if policy else range(1)
    async with start_suite(
        model,
        num_engines=3,
        num_kvtransfers=2 if transport == "tcp" else 1,
        policy=policy,
        engine_options=["--lease-default", "2"],
        options_of=dict.fromkeys(gated, gates.options),
        kv_memory_mib=32,
    ) as suite:
        expected = (await generate(suite, suite.engines[2], PROMPT, salt="expected")).token_ids
        yield Scene(suite, gates, model, expected)


@asynccontextmanager
async def undisturbed(scene: Scene) -> AsyncIterator[None]:
    """A stream of the bystander that begins before the block does its work and must not notice."""
    begun = asyncio.Event()
    streaming = asyncio.create_task(
        generate(scene.suite, scene.bystander, PROMPT, max_tokens=400, salt="by", begun=begun)
    )
    async with asyncio.timeout(120):
        await begun.wait()
    yield
    result = await streaming
    assert len(result.token_ids) == 400
    assert result.token_ids[:16] == scene.expected


async def at_each_boundary(scene: Scene, fault: Callable[[Gate, str], Awaitable[None]]) -> None:
    for layer in range(LAYER_COUNT):
        with scene.gates.closed(layer) as gate:
            async with undisturbed(scene):
                await fault(gate, f"layer {layer}")
        await scene.check_transfer(f"after layer {layer}")
        await scene.everything_back()


@each_transport
async def test_the_sender_is_killed(tmp_path: Path, transport: str) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared = await s.prepare(salt)
            sending = s.send(prepared, salt, 20)
            await gate.reached()
            s.sender.process.kill()
            assert await sending is CODES.UNAVAILABLE
            gate.open()
            # The reservation outlived its sender, and its pages are written anew.
            await remote_send(s.suite, s.bystander, PROMPT, prepared.address, attempt=2, cache_salt=salt)
            await s.check_receiver(prepared, salt)
            await s.replace(0)

        await at_each_boundary(s, fault)


@each_transport
async def test_the_sender_stands_still(tmp_path: Path, transport: str) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            async def begin(timeout_s: float) -> grpc.StatusCode:
                return await s.send(await s.prepare(salt, 2 * timeout_s), salt, timeout_s)

            # The lease may run out too soon as well.
            sending = await gate.with_deadline(begin, too_soon=(CODES.DEADLINE_EXCEEDED, CODES.ABORTED))
            s.sender.process.pause()
            assert await sending is CODES.DEADLINE_EXCEEDED
            again = await s.prepare(f"{salt} again")
            await remote_send(s.suite, s.bystander, PROMPT, again.address, cache_salt=f"{salt} again")
            await s.check_receiver(again, f"{salt} again")
            await wait_for_load(s.receiver, idle)
            # What it does now comes after the lease: it must change nothing that others read.
            s.sender.process.resume()
            gate.open()
            await wait_for_load(s.sender, idle)
            result = await generate(s.suite, s.receiver, PROMPT, salt=f"{salt} again")
            assert result.token_ids == s.expected
            assert result.timing.computed_token_count == 1

        await at_each_boundary(s, fault)


@each_transport
async def test_the_receiver_is_killed(tmp_path: Path, transport: str) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared = await s.prepare(salt)
            sending = s.send(prepared, salt, 20)
            await gate.reached()
            s.receiver.process.kill()
            s.receiver.process.wait(60)
            gate.open()
            # The last layer may have been in place before.
            assert await sending in (CODES.ABORTED, CODES.OK)
            await wait_for_load(s.sender, idle)
            await s.replace(1)

        await at_each_boundary(s, fault)


@each_transport
async def test_the_receiver_stands_still(tmp_path: Path, transport: str) -> None:
    """Puts are one-sided: the receiver's engine is not needed for them."""
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared = await s.prepare(salt)
            sending = s.send(prepared, salt, 20)
            await gate.reached()
            s.receiver.process.pause()
            gate.open()
            assert await sending is CODES.OK
            with failing(CODES.DEADLINE_EXCEEDED):
                await s.receiver.stub.GetInfo(engine.GetInfoRequest(), timeout=0.3)
            s.receiver.process.resume()
            await s.check_receiver(prepared, salt)

        await at_each_boundary(s, fault)


@each_service
async def test_a_transfer_service_is_killed(tmp_path: Path, transport: str, index: int) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared = None

            async def begin_leased(seconds: float) -> grpc.StatusCode:
                return await s.send(await s.prepare(salt, 8 * seconds), salt, 120)

            if salt == "layer 1":
                # Nobody gives this one up: its lease runs out, here or, where that was too soon, in another one.
                sending = await gate.with_deadline(begin_leased, too_soon=(CODES.ABORTED,))
            else:
                prepared = await s.prepare(salt)
                sending = s.send(prepared, salt, 20)
                await gate.reached()
            old = s.suite.kvtransfers[index]
            address = old.address
            old.kill()
            gate.open()
            assert await sending in (CODES.UNAVAILABLE, CODES.ABORTED, CODES.OK)
            if prepared is not None:
                await s.give_up(prepared)
            await s.pair_idle()
            new = s.suite.fleet.start_kvtransfer(f"{old.name} {salt}", listen=address)
            new.wait_ready()
            s.suite.replace_kvtransfer(index, new)

        await at_each_boundary(s, fault)


@each_service
async def test_a_transfer_service_stands_still(tmp_path: Path, transport: str, index: int) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared, attempts = await s.prepare(salt), itertools.count(1)

            async def begin(timeout_s: float) -> grpc.StatusCode:
                return await s.send(prepared, salt, timeout_s, next(attempts))

            sending = await gate.with_deadline(begin)
            s.suite.kvtransfers[index].pause()
            gate.open()
            assert await sending in (CODES.DEADLINE_EXCEEDED, CODES.UNAVAILABLE, CODES.OK)
            for at in (s.sender, s.receiver):
                assert (await generate(s.suite, at, PROMPT, salt=f"alone {salt}")).token_ids == s.expected
            asked = engine.PrepRecvRequest(
                owner_id="test", request_id=s.suite.new_id(), prompt_token_ids=PROMPT, end=END, cache_salt="stuck"
            )
            asked.lease.FromSeconds(LEASE_S)
            with failing(CODES.DEADLINE_EXCEEDED):
                await s.suite.engines[index].stub.PrepRecv(asked, timeout=0.5)
            s.suite.kvtransfers[index].resume()
            await s.give_up(prepared)

        await at_each_boundary(s, fault)


@each_transport
async def test_the_router_is_killed(tmp_path: Path, transport: str) -> None:
    async with scene(tmp_path, transport, "disaggregated") as s:

        async def fault(gate: Gate, salt: str) -> None:
            stream = asyncio.ensure_future(through_router(s, salt, 20))
            await gate.reached()
            suite = s.suite
            assert suite.router_process is not None
            suite.router_process.kill()
            gate.open()
            assert await stream is CODES.UNAVAILABLE
            await s.pair_idle()
            engines = [at.process for at in suite.engines]
            suite.router_process = suite.fleet.start_router(engines, "disaggregated", name=f"router {salt}")
            front = suite.connect(suite.router_process.address)
            suite.router, suite.admin = RouterServiceStub(front), AdminServiceStub(front)
            await wait_serving(suite.router_process.address, 120)
            await router_sees(suite, 3)
            assert (await ask(suite, PROMPT, "disaggregated", salt=f"again {salt}")).token_ids == s.expected

        await at_each_boundary(s, fault)


@each_transport
async def test_the_router_stands_still(tmp_path: Path, transport: str) -> None:
    async with scene(tmp_path, transport, "disaggregated") as s:

        async def fault(gate: Gate, salt: str) -> None:
            stream = await gate.with_deadline(lambda timeout_s: through_router(s, salt, timeout_s))
            assert s.suite.router_process is not None
            s.suite.router_process.pause()
            gate.open()
            assert await stream is CODES.DEADLINE_EXCEEDED
            # Nobody renews the reservation: its lease ends.
            await s.pair_idle()
            s.suite.router_process.resume()
            assert (await ask(s.suite, PROMPT, "disaggregated", salt=f"again {salt}")).token_ids == s.expected

        await at_each_boundary(s, fault)


async def through_router(s: Scene, salt: str, timeout_s: float) -> grpc.StatusCode:
    request = router.GenerateRequest(tokens=router.TokenIds(ids=PROMPT), cache_salt=salt)
    request.sampling.max_tokens = 16
    assert s.suite.router is not None
    return await outcome(drain(s.suite.router.Generate(request, timeout=timeout_s)))
