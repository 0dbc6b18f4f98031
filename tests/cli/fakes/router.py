"""A router whose engines are imaginary: the answer says what was asked, and two legs what was done."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from microserve.router.v1 import admin_pb2, admin_pb2_grpc, router_pb2, router_pb2_grpc
from microserve.types.v1 import sampling_pb2

from services.protocol.errors import Code, ServiceError
from services.rpc.config import parse_config
from services.rpc.main import run_main
from services.rpc.server import Server
from tests.cli.fakes.config import RouterConfig

PROGRAMS = {"disaggregated": "Prefill here, decode there.", "data_parallel": "One engine does all."}

MODEL = "imaginary"


class UnknownPolicy(ServiceError):
    code = Code.NOT_FOUND
    reason = "UNKNOWN_POLICY"


class UnknownModel(ServiceError):
    code = Code.NOT_FOUND
    reason = "UNKNOWN_MODEL"


class UploadDisabled(ServiceError):
    code = Code.PERMISSION_DENIED
    reason = "UPLOAD_DISABLED"


def leg(verb: int, engine: str, begin: int, end: int, timing: sampling_pb2.Timing) -> sampling_pb2.Leg:
    message = sampling_pb2.Leg(verb=verb, engine=engine, timing=timing)  # type: ignore[arg-type]
    message.range.begin, message.range.end = begin, end
    message.elapsed.FromMilliseconds(12)
    return message


LEGS = [
    leg(sampling_pb2.VERB_PREP_RECV, "engine-1", 0, 9, sampling_pb2.Timing(matched_token_count=4)),
    leg(
        sampling_pb2.VERB_REMOTE_SEND,
        "engine-0",
        4,
        9,
        sampling_pb2.Timing(transferred_token_count=5, computed_token_count=9, transferred_bytes=1_234_567),
    ),
    leg(sampling_pb2.VERB_START_GENERATE, "engine-1", 9, 10, sampling_pb2.Timing(generated_token_count=2)),
]


class Router(router_pb2_grpc.RouterServiceServicer):
    """Answers with the question; "wait" waits for ever after the first word, "stuck" ends as a
    router does whose event loop a program holds."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin

    async def Generate(
        self, request: router_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        metadata = dict(context.invocation_metadata())
        if request.model not in ("", MODEL):
            raise UnknownModel(f"there is no model {request.model!r}")
        policy = self.admin.find(metadata.get("x-microserve-policy", self.admin.current))
        text = request.text or request.chat.messages[0].content
        yield router_pb2.GenerateResponse(text="You said ", request_id="r1", policy=policy)
        if text == "stuck":
            os._exit(os.EX_SOFTWARE)
        if text == "wait":
            await asyncio.Event().wait()
        yield router_pb2.GenerateResponse(text=f"[b]{text}[/b]", token_ids=[1, 2])
        usage = router_pb2.Usage(prompt_token_count=10, cached_token_count=4, output_token_count=2)
        yield router_pb2.GenerateResponse(finish_reason=sampling_pb2.FINISH_REASON_STOP, usage=usage, legs=LEGS)


class Admin(admin_pb2_grpc.AdminServiceServicer):
    """Knows PROGRAMS and the engines of its command line."""

    def __init__(self, config: RouterConfig) -> None:
        self.engines = config.engine
        self.current = config.policy
        self.split = admin_pb2.Split()
        self.planner = ""

    def find(self, name: str) -> str:
        if name not in PROGRAMS:
            raise UnknownPolicy(f"there is no policy {name!r}")
        return name

    def info(self, name: str) -> admin_pb2.PolicyInfo:
        return admin_pb2.PolicyInfo(
            name=self.find(name), summary=PROGRAMS[name], current=name == self.current, file=f"{name}.py"
        )

    async def ListEngines(self, request: Any, context: Any) -> admin_pb2.ListEnginesResponse:
        engines = [admin_pb2.EngineStatus(address=address, healthy=True) for address in self.engines]
        engines.append(admin_pb2.EngineStatus(address="10.0.0.9:1", problem="connection refused"))
        engines[0].info.engine_name = "engine-0"
        engines[0].load.pages.total = 512
        return admin_pb2.ListEnginesResponse(engines=engines)

    async def AddEngine(self, request: Any, context: Any) -> admin_pb2.AddEngineResponse:
        self.engines = (*self.engines, request.address)
        return admin_pb2.AddEngineResponse()

    async def RemoveEngine(self, request: Any, context: Any) -> admin_pb2.RemoveEngineResponse:
        self.engines = tuple(address for address in self.engines if address != request.address)
        return admin_pb2.RemoveEngineResponse()

    async def DrainEngine(self, request: Any, context: Any) -> admin_pb2.DrainEngineResponse:
        if request.address == "10.0.0.9:1":
            raise UnknownPolicy(f"{request.resume} {request.migrate}")
        return admin_pb2.DrainEngineResponse()

    async def ListPolicies(self, request: Any, context: Any) -> admin_pb2.ListPoliciesResponse:
        return admin_pb2.ListPoliciesResponse(policies=[self.info(name) for name in sorted(PROGRAMS)])

    async def GetPolicy(self, request: Any, context: Any) -> admin_pb2.GetPolicyResponse:
        info = self.info(request.name or self.current)
        return admin_pb2.GetPolicyResponse(policy=info, source=f'"""{info.summary}"""\n')

    async def SetPolicy(self, request: Any, context: Any) -> admin_pb2.SetPolicyResponse:
        if request.source:
            raise UploadDisabled("this router takes no code over the network")
        self.current = self.find(request.name)
        return admin_pb2.SetPolicyResponse(policy=self.info(self.current))

    async def RollBackPolicy(self, request: Any, context: Any) -> admin_pb2.RollBackPolicyResponse:
        self.current = "data_parallel"
        return admin_pb2.RollBackPolicyResponse(policy=self.info(self.current))

    async def SplitPolicies(self, request: Any, context: Any) -> admin_pb2.SplitPoliciesResponse:
        self.split = admin_pb2.Split(active=bool(request.shares), arms=self.split.arms)
        for share in request.shares:
            arm = self.split.arms.add(policy=share.policy, percent=share.percent)
            if share.percent >= 1:
                arm.request_count_by_code.update({"OK": 3, "ABORTED": 1, "INVALID_ARGUMENT": 2})
                arm.ttft.mean.FromMilliseconds(25)
        return admin_pb2.SplitPoliciesResponse(split=self.split)

    async def StartPlanner(self, request: Any, context: Any) -> admin_pb2.StartPlannerResponse:
        if request.source:
            raise UploadDisabled("this router takes no code over the network")
        if request.name != "by_topic":
            raise UnknownPolicy(f"there is no planner named {request.name!r}")
        self.planner = request.name
        return admin_pb2.StartPlannerResponse()

    async def StopPlanner(self, request: Any, context: Any) -> admin_pb2.StopPlannerResponse:
        self.planner = ""
        return admin_pb2.StopPlannerResponse()

    async def GetPlanner(self, request: Any, context: Any) -> admin_pb2.GetPlannerResponse:
        reply = admin_pb2.GetPlannerResponse(planner="by_topic", problem="" if self.planner else "it was stopped")
        reply.programs.add(name="by_topic")
        if self.planner:
            reply.topics.add(name="topic-1", token_count=512, requests_per_s=2.5, homes=["engine-0", "engine-1"])
            reply.topics[0].cached_token_count["engine-0"] = 512
            move = reply.moves.add(topic="topic-1", source_engine="engine-0", target_engine="engine-1", code="OK")
            move.why, move.moved_token_count, move.moved_bytes = "saves more", 512, 2_000_000
            move.elapsed.FromMilliseconds(40)
            reply.move_count_by_code["OK"] = 1
        return reply

    async def ExplainRequest(self, request: Any, context: Any) -> admin_pb2.ExplainRequestResponse:
        if request.request_id == "plain":
            return admin_pb2.ExplainRequestResponse(policy="data_parallel", code="OK")
        reply = admin_pb2.ExplainRequestResponse(policy="adaptive", code="OK", weighed_count=9, legs=LEGS)
        reply.chosen.pattern, reply.chosen.decode_engine, reply.chosen.split = "balanced", "engine-1", 48
        reply.chosen.prefill_engine = "engine-0"
        reply.chosen.jct.FromMilliseconds(70)
        reply.alternatives.add(pattern="data_parallel", decode_engine="engine-0")
        reply.jct.FromMilliseconds(80)
        return reply

    async def GetSplit(self, request: Any, context: Any) -> admin_pb2.GetSplitResponse:
        return admin_pb2.GetSplitResponse(split=self.split)


async def serve(config: RouterConfig) -> None:
    server = Server(config, "router")
    admin = Admin(config)
    router_pb2_grpc.add_RouterServiceServicer_to_server(Router(admin), server.grpc)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server.grpc)
    await server.start()
    for name in ("microserve.router.v1.RouterService", "microserve.router.v1.AdminService"):
        await server.set_serving(name, True)
    server.announce()
    await server.run()


if __name__ == "__main__":
    run_main("fake-router", serve(parse_config(RouterConfig, sys.argv[1:], "fake-router")))
