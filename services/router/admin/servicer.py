"""AdminService on the wire."""

from __future__ import annotations

import logging
from typing import Any

import grpc.aio
from microserve.engine.v1 import engine_pb2
from microserve.router.v1 import admin_pb2, admin_pb2_grpc

from services.router.admin.wire import explanation_to_wire, planner_to_wire, split_to_wire
from services.router.errors import BadPolicy, UploadDisabled
from services.router.fleet.breaker import BreakerState
from services.router.fleet.member import Member
from services.router.fleet.membership import Membership, checked_address
from services.router.fleet.registry import Registry
from services.router.planning.host import PlannerHost
from services.router.programs.catalogue import Catalogue
from services.router.programs.library import Library
from services.router.programs.loader import load_upload
from services.router.programs.program import Program
from services.router.traces import Traces
from services.router.wire import leg_to_wire

log = logging.getLogger(__name__)

_BREAKERS = {
    BreakerState.CLOSED: admin_pb2.BREAKER_STATE_CLOSED,
    BreakerState.HALF_OPEN: admin_pb2.BREAKER_STATE_HALF_OPEN,
    BreakerState.OPEN: admin_pb2.BREAKER_STATE_OPEN,
}

Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Shows engines, programs and traces, and changes the program in use."""

    def __init__(
        self,
        registry: Registry,
        membership: Membership,
        catalogue: Catalogue,
        planners: PlannerHost,
        traces: Traces,
        *,
        take_uploads: bool,
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._catalogue = catalogue
        self._planners = planners
        self._traces = traces
        self._take_uploads = take_uploads

    async def ListEngines(
        self, request: admin_pb2.ListEnginesRequest, context: Context
    ) -> admin_pb2.ListEnginesResponse:
        members = sorted(self._registry.members.values(), key=lambda member: member.address)
        return admin_pb2.ListEnginesResponse(engines=map(self._engine_status, members))

    async def AddEngine(self, request: admin_pb2.AddEngineRequest, context: Context) -> admin_pb2.AddEngineResponse:
        self._membership.add(checked_address(request.address))
        self._log_change("engine added by an operator", request.address, context)
        return admin_pb2.AddEngineResponse()

    async def RemoveEngine(
        self, request: admin_pb2.RemoveEngineRequest, context: Context
    ) -> admin_pb2.RemoveEngineResponse:
        self._membership.remove(request.address)
        self._log_change("engine removed by an operator", request.address, context)
        return admin_pb2.RemoveEngineResponse()

    async def DrainEngine(
        self, request: admin_pb2.DrainEngineRequest, context: Context
    ) -> admin_pb2.DrainEngineResponse:
        self._membership.drain(request.address, not request.resume, migrate=request.migrate)
        what = "engine resumed by an operator" if request.resume else "engine drained by an operator"
        self._log_change(what, request.address, context)
        return admin_pb2.DrainEngineResponse()

    async def ListPolicies(
        self, request: admin_pb2.ListPoliciesRequest, context: Context
    ) -> admin_pb2.ListPoliciesResponse:
        return admin_pb2.ListPoliciesResponse(policies=map(self._describe, self._catalogue.programs()))

    async def GetPolicy(self, request: admin_pb2.GetPolicyRequest, context: Context) -> admin_pb2.GetPolicyResponse:
        program = self._catalogue.get(request.name.partition(":")[0])
        return admin_pb2.GetPolicyResponse(policy=self._describe(program), source=program.source)

    async def SetPolicy(self, request: admin_pb2.SetPolicyRequest, context: Context) -> admin_pb2.SetPolicyResponse:
        if request.source:
            await self._upload(request.name, request.source, self._catalogue)
        elif not request.name:
            raise BadPolicy("name a policy")
        current = self._catalogue.use(request.name)
        fields = {"policy": current.spec, "uploaded": bool(request.source), "peer": context.peer()}
        log.info("policy set", extra={"fields": fields})
        return admin_pb2.SetPolicyResponse(policy=self._describe(current.program))

    async def RollBackPolicy(
        self, request: admin_pb2.RollBackPolicyRequest, context: Context
    ) -> admin_pb2.RollBackPolicyResponse:
        restored = self._catalogue.roll_back()
        log.info("policy rolled back", extra={"fields": {"policy": restored.spec, "peer": context.peer()}})
        return admin_pb2.RollBackPolicyResponse(policy=self._describe(restored.program))

    async def SplitPolicies(
        self, request: admin_pb2.SplitPoliciesRequest, context: Context
    ) -> admin_pb2.SplitPoliciesResponse:
        shares = [(share.policy, share.percent) for share in request.shares]
        if shares:
            self._catalogue.begin_split(shares)
        else:
            self._catalogue.end_split()
        fields = {"shares": " ".join(f"{name}={percent:g}" for name, percent in shares), "peer": context.peer()}
        log.info("policies split", extra={"fields": fields})
        return admin_pb2.SplitPoliciesResponse(split=split_to_wire(self._catalogue.split))

    async def GetSplit(self, request: admin_pb2.GetSplitRequest, context: Context) -> admin_pb2.GetSplitResponse:
        return admin_pb2.GetSplitResponse(split=split_to_wire(self._catalogue.split))

    async def StartPlanner(
        self, request: admin_pb2.StartPlannerRequest, context: Context
    ) -> admin_pb2.StartPlannerResponse:
        library = self._planners.library
        if request.source:
            await self._upload(request.name, request.source, library)
        await self._planners.start(library.bind(request.name))
        self._log_planner("planner started by an operator", context)
        return admin_pb2.StartPlannerResponse()

    async def StopPlanner(
        self, request: admin_pb2.StopPlannerRequest, context: Context
    ) -> admin_pb2.StopPlannerResponse:
        await self._planners.stop()
        self._log_planner("planner stopped by an operator", context)
        return admin_pb2.StopPlannerResponse()

    async def GetPlanner(self, request: admin_pb2.GetPlannerRequest, context: Context) -> admin_pb2.GetPlannerResponse:
        return planner_to_wire(self._planners.status(), self._planners.library.programs())

    async def GetTrace(self, request: admin_pb2.GetTraceRequest, context: Context) -> admin_pb2.GetTraceResponse:
        trace = self._traces.get(request.request_id)
        return admin_pb2.GetTraceResponse(policy=trace.policy, legs=map(leg_to_wire, trace.legs), code=trace.code)

    async def ExplainRequest(
        self, request: admin_pb2.ExplainRequestRequest, context: Context
    ) -> admin_pb2.ExplainRequestResponse:
        return explanation_to_wire(self._traces.get(request.request_id))

    async def _upload(self, spec: str, source: str, library: Library) -> None:
        """Takes in a program that somebody wrote. UploadDisabled, BadPolicy."""
        if not self._take_uploads:
            raise UploadDisabled(
                "programs are not taken at this address, only at --admin-listen of a router with"
                " --allow-policy-upload (`microserve up --admin-port PORT` starts one)"
            )
        name, _, params = spec.partition(":")
        program = await load_upload(name, source, library.kind)
        program.bind(params)
        library.add(program)

    def _log_planner(self, what: str, context: Context) -> None:
        log.info(what, extra={"fields": {"planner": self._planners.status().spec, "peer": context.peer()}})

    def _describe(self, program: Program) -> admin_pb2.PolicyInfo:
        current = self._catalogue.current
        in_use = program is current.program
        return admin_pb2.PolicyInfo(
            name=current.spec if in_use else program.name, summary=program.summary, current=in_use, file=program.file
        )

    def _engine_status(self, member: Member) -> admin_pb2.EngineStatus:
        problem = self._registry.state(member)
        status = admin_pb2.EngineStatus(
            address=member.address,
            healthy=not problem,
            problem=problem,
            cached_block_count=len(member.blocks),
            breaker=_BREAKERS[member.breaker.state],
            sources=self._membership.sources(member.address),
        )
        if member.info is not None:
            status.info.CopyFrom(engine_pb2.GetInfoResponse.FromString(member.info.raw))
        if not member.problem:
            status.load.CopyFrom(engine_pb2.WatchLoadResponse.FromString(member.load.raw))
        return status

    @staticmethod
    def _log_change(what: str, address: str, context: Context) -> None:
        log.info(what, extra={"fields": {"address": address, "peer": context.peer()}})
