"""The router as the commands see it: calls in, plain values out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from microserve.router.v1 import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc

from services.cli.access import ADMIN_KEY_VARIABLE, KEY_VARIABLE, router_channel
from services.cli.errors import CliError
from services.cli.unreachable import unreachable
from services.cli.values import Answer, Engine, Explanation, Planner, Policy, Question, Split
from services.cli.wire import request_message, to_answer, to_engine, to_explanation, to_planner, to_policy, to_split
from services.protocol.errors import Code
from services.rpc.channel import make_channel
from services.rpc.status import RemoteError, remote_errors

Reply = TypeVar("Reply")

POLICY_KEY = "x-microserve-policy"
# For questions about the fleet, which no engine computes on.
_ADMIN_TIMEOUT_S = 10.0
_ADMIN_SERVICE = "microserve.router.v1.AdminService"
_ROUTER_SERVICE = "microserve.router.v1.RouterService"


@dataclass(frozen=True, slots=True)
class RouterClient:
    """Calls to one router. Every failure is a CliError of one line."""

    address: str
    channel: grpc.aio.Channel

    async def generate(self, question: Question, *, timeout_s: float) -> AsyncGenerator[str | Answer, None]:
        """Pieces of text as they come, and the whole answer last. Leaving it early cancels the request."""
        stub = router_pb2_grpc.RouterServiceStub(self.channel)
        metadata = ((POLICY_KEY, question.policy),) if question.policy else ()
        call = stub.Generate(request_message(question), timeout=timeout_s, metadata=metadata)
        pieces: list[router_pb2.GenerateResponse] = []
        try:
            with remote_errors():
                async for piece in call:
                    pieces.append(piece)
                    if piece.text:
                        yield piece.text
        finally:
            call.cancel()
        yield to_answer(pieces)

    async def list_engines(self) -> list[Engine]:
        """The fleet, by address."""
        reply = await self._admin.ListEngines(admin_pb2.ListEnginesRequest(), timeout=_ADMIN_TIMEOUT_S)
        return [to_engine(engine) for engine in reply.engines]

    async def add_engine(self, address: str) -> None:
        """Takes an engine into the fleet."""
        await self._admin.AddEngine(admin_pb2.AddEngineRequest(address=address), timeout=_ADMIN_TIMEOUT_S)

    async def remove_engine(self, address: str) -> None:
        """Takes an engine out of the fleet; what runs there goes on elsewhere or to its end."""
        await self._admin.RemoveEngine(admin_pb2.RemoveEngineRequest(address=address), timeout=_ADMIN_TIMEOUT_S)

    async def drain_engine(self, address: str, *, resume: bool, migrate: bool) -> None:
        """An engine takes no new work, or takes it again; with `migrate` what runs there goes on elsewhere."""
        request = admin_pb2.DrainEngineRequest(address=address, resume=resume, migrate=migrate)
        await self._admin.DrainEngine(request, timeout=_ADMIN_TIMEOUT_S)

    async def list_policies(self) -> list[Policy]:
        """Programs at hand, by name."""
        reply = await self._admin.ListPolicies(admin_pb2.ListPoliciesRequest(), timeout=_ADMIN_TIMEOUT_S)
        return [to_policy(policy) for policy in reply.policies]

    async def get_policy(self, name: str) -> tuple[Policy, str]:
        """A program (empty name: the current one) and its source."""
        request = admin_pb2.GetPolicyRequest(name=name)
        reply = await self._admin.GetPolicy(request, timeout=_ADMIN_TIMEOUT_S)
        return to_policy(reply.policy), reply.source

    async def set_policy(self, name: str, source: str = "") -> Policy:
        """Makes a program the current one; with `source` it is uploaded first."""
        request = admin_pb2.SetPolicyRequest(name=name, source=source)
        reply = await self._admin.SetPolicy(request, timeout=_ADMIN_TIMEOUT_S)
        return to_policy(reply.policy)

    async def roll_back_policy(self) -> Policy:
        """Restores the last good program."""
        reply = await self._admin.RollBackPolicy(admin_pb2.RollBackPolicyRequest(), timeout=_ADMIN_TIMEOUT_S)
        return to_policy(reply.policy)

    async def split_policies(self, shares: Mapping[str, float]) -> Split:
        """Begins a split; with no shares ends it."""
        wanted = [admin_pb2.PolicyShare(policy=name, percent=percent) for name, percent in shares.items()]
        request = admin_pb2.SplitPoliciesRequest(shares=wanted)
        return to_split((await self._admin.SplitPolicies(request, timeout=_ADMIN_TIMEOUT_S)).split)

    async def get_split(self) -> Split:
        """The present or last split with its results."""
        return to_split((await self._admin.GetSplit(admin_pb2.GetSplitRequest(), timeout=_ADMIN_TIMEOUT_S)).split)

    async def get_planner(self) -> Planner:
        """What the planner sees and did."""
        return to_planner(await self._admin.GetPlanner(admin_pb2.GetPlannerRequest(), timeout=_ADMIN_TIMEOUT_S))

    async def start_planner(self, name: str, source: str = "") -> None:
        """Runs a planner in place of the present one; with `source` it is uploaded first."""
        request = admin_pb2.StartPlannerRequest(name=name, source=source)
        await self._admin.StartPlanner(request, timeout=_ADMIN_TIMEOUT_S)

    async def stop_planner(self) -> None:
        """Ends the planner, if one runs."""
        await self._admin.StopPlanner(admin_pb2.StopPlannerRequest(), timeout=_ADMIN_TIMEOUT_S)

    async def explain(self, request_id: str) -> Explanation:
        """Why a recent request ran where it did."""
        request = admin_pb2.ExplainRequestRequest(request_id=request_id)
        reply = await self._admin.ExplainRequest(request, timeout=_ADMIN_TIMEOUT_S)
        return to_explanation(request_id, reply)

    @property
    def _admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel)


@asynccontextmanager
async def router_client(address: str) -> AsyncIterator[RouterClient]:
    """A client for the time of the block, inside which every failed call becomes a CliError."""
    async with router_channel(address) as channel:
        try:
            with remote_errors():
                yield RouterClient(address, channel)
        except RemoteError as error:
            if _is_unknown(error) and await _is_admin_address(channel):
                raise CliError(
                    f"{address} is the router's address for administration alone (--admin-listen);"
                    " --address takes its gRPC address (--listen)"
                ) from None
            raise _explain(address, error) from None


async def wait_serving(address: str, timeout_s: float) -> None:
    """Waits until grpc.health says that the whole server serves. CliError if it does not in time."""
    async with make_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
        try:
            async for reply in watch:
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.aio.AioRpcError as error:
            raise CliError(f"{address} is not healthy: {error.details()}") from None
        finally:
            watch.cancel()


def _is_unknown(error: RemoteError) -> bool:
    """Whether what was asked is nothing that the other side has."""
    return error.code is Code.UNIMPLEMENTED and error.reason == Code.UNIMPLEMENTED.name


async def _is_admin_address(channel: grpc.aio.Channel) -> bool:
    """Whether AdminService is there without RouterService, as far as health tells."""
    return await _has(channel, _ADMIN_SERVICE) and not await _has(channel, _ROUTER_SERVICE)


async def _has(channel: grpc.aio.Channel, service: str) -> bool:
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=_ADMIN_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return True


def _explain(address: str, error: RemoteError) -> CliError:
    sentence = re.sub(r"\s+", " ", error.message)
    # A reason of its own means that the router answered; gRPC's own UNAVAILABLE means that nobody did.
    if error.code is Code.UNAVAILABLE and error.reason == Code.UNAVAILABLE.name:
        return unreachable(address, sentence)
    if error.code is Code.DEADLINE_EXCEEDED and error.reason == Code.DEADLINE_EXCEEDED.name:
        sentence = f"the router at {address} did not answer in time"
    if _is_unknown(error):
        sentence = f"what answers at {address} is no router of this version: an engine, or a KV transfer service?"
    if error.code is Code.UNAUTHENTICATED:
        sentence += (
            f"; the commands show {KEY_VARIABLE}, for the fleet and policies {ADMIN_KEY_VARIABLE},"
            " at 127.0.0.1 the key that `microserve up --admin-port` wrote"
        )
    name = error.reason if error.reason == error.code.name else f"{error.code.name}, {error.reason}"
    return CliError(f"{sentence} ({name})")


def call_router(address: str, call: Callable[[RouterClient], Awaitable[Reply]]) -> Reply:
    """What `call` gives, made with a client of the router at `address` (host:port). CliError."""

    async def run() -> Reply:
        async with router_client(address) as router:
            return await call(router)

    return asyncio.run(run())
