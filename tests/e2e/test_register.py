"""Real engines that join a real router by themselves, leave when they are stopped, are missed when killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from microserve.router.v1 import admin_pb2 as admin
from microserve.router.v1 import router_pb2 as router
from microserve.router.v1.admin_pb2_grpc import AdminServiceStub
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from microserve.types.v1 import sampling_pb2 as sampling

from services.cli.client import wait_serving
from services.cli.fleet import Fleet
from services.rpc.channel import make_channel
from tests.e2e.waiting import until
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

TOKEN = ["--register-token", "a-token-for-engines"]


async def test_engines_join_leave_and_die(tmp_path: Path) -> None:
    os.environ["MICROSERVE_TESTING"] = "1"
    model = make_tiny_llama(tmp_path)
    with Fleet() as fleet:
        process = fleet.start_router([], "data_parallel", extra=[*TOKEN, "--register-lease", "4"])
        joining = ["--register", process.address, *TOKEN, "--kv-memory-mib", "16"]
        engines = [fleet.start_engine(f"engine-{i}", model, None, extra=joining) for i in range(2)]
        async with make_channel(process.address) as channel:
            stub, admins = RouterServiceStub(channel), AdminServiceStub(channel)

            async def names() -> set[str]:
                listed = await admins.ListEngines(admin.ListEnginesRequest())
                return {each.info.engine_name for each in listed.engines if each.healthy}

            async def addresses() -> set[str]:
                return {each.address for each in (await admins.ListEngines(admin.ListEnginesRequest())).engines}

            await wait_serving(process.address, 120)
            await until(names, {"engine-0", "engine-1"})
            request = router.GenerateRequest(
                tokens=router.TokenIds(ids=range(3, 40)),
                sampling=sampling.SamplingParams(max_tokens=8, ignore_eos=True),
            )
            whole = (await stub.Complete(router.CompleteRequest(request=request), timeout=30)).response
            assert len(whole.token_ids) == 8
            engines[0].terminate()
            await until(addresses, {engines[1].address})
            engines[1].kill()
            await until(names, set())
            await until(addresses, set())  # when its lease is over
