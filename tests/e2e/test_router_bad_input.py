"""Bad input and bad programs at the front door: the right code, a reason and a sentence, and service goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from microserve.router.v1 import admin_pb2 as admin
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from services.cli.client import wait_serving
from tests.e2e.errors import failing
from tests.e2e.suite import Suite, ask, idle, wait_for_load

pytestmark = pytest.mark.slow

LEAKS = """
async def policy(request, fleet):
    \"\"\"Reserves, and forgets.\"\"\"
    prefill, decode = fleet.pair(request)
    reservation = decode.prep_recv(request, end=len(request.prompt) - 1)
    await reservation.__aenter__()
    raise RuntimeError("the program's own secret text")
    yield
"""
SLEEPS = """
import asyncio


async def policy(request, fleet):
    \"\"\"Never comes back.\"\"\"
    await asyncio.Event().wait()
    yield
"""


@pytest.fixture(scope="module")
def suite(tiny_suite: Suite) -> Suite:
    return tiny_suite


def request_of(**fields: object) -> router.GenerateRequest:
    return router.GenerateRequest(**{"text": "Hello", "sampling": sampling.SamplingParams(max_tokens=4), **fields})


BAD = {
    "no prompt": (router.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    "empty text": (request_of(text=""), grpc.StatusCode.INVALID_ARGUMENT),
    "empty tokens": (router.GenerateRequest(tokens=router.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT),
    "token out of range": (
        router.GenerateRequest(tokens=router.TokenIds(ids=[1, 2, 4_000_000])),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "longer than the context": (
        router.GenerateRequest(tokens=router.TokenIds(ids=[5] * 500_000)),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "absurd temperature": (
        request_of(sampling=sampling.SamplingParams(temperature=float("nan"))),
        grpc.StatusCode.INVALID_ARGUMENT,
    ),
    "negative top_p": (request_of(sampling=sampling.SamplingParams(top_p=-1)), grpc.StatusCode.INVALID_ARGUMENT),
    "too many stop strings": (request_of(stop=["x"] * 100), grpc.StatusCode.INVALID_ARGUMENT),
    "unknown model": (request_of(model="gpt-17"), grpc.StatusCode.NOT_FOUND),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(suite: Suite, name: str) -> None:
    assert suite.router is not None
    request, code = BAD[name]
    with failing(code) as failure:
        await suite.router.Complete(router.CompleteRequest(request=request), timeout=30)
    assert failure.reason
    assert len(failure.message) > 10
    await goes_on(suite)


async def test_ten_megabytes(suite: Suite) -> None:
    assert suite.router is not None
    with failing(grpc.StatusCode.RESOURCE_EXHAUSTED):
        await suite.router.Complete(router.CompleteRequest(request=request_of(text="x" * 10_000_000)), timeout=30)
    await goes_on(suite)


async def test_unknown_policy(suite: Suite) -> None:
    with failing(grpc.StatusCode.NOT_FOUND, "UNKNOWN_POLICY"):
        await ask(suite, [5, 6, 7], "no_such_policy")
    await goes_on(suite)


async def test_policies_that_fail(suite: Suite, tmp_path: Path) -> None:
    for source, patience_s, code, reason in [
        (LEAKS, 60, grpc.StatusCode.ABORTED, "POLICY_FAILED"),
        (SLEEPS, 2, grpc.StatusCode.DEADLINE_EXCEEDED, None),
    ]:
        file = tmp_path / f"bad_{code.name.lower()}.py"
        file.write_text(source)
        bad = suite.fleet.start_router(
            [each.process for each in suite.engines], file, name=file.stem, extra=["--policy-timeout", str(patience_s)]
        )
        await wait_serving(bad.address, 120)
        stub = type(suite.router)(suite.connect(bad.address))
        with failing(code, reason) as failure:
            await stub.Complete(router.CompleteRequest(request=request_of(text="word " * 40)), timeout=120)
        assert "secret text" not in failure.message
        for at in suite.engines:
            await wait_for_load(at, idle)
        bad.terminate()
        assert bad.wait(60) == 0


async def test_five_policies_rotate_under_two_hundred_requests(suite: Suite) -> None:
    """None is lost, and each answer is that of one engine alone."""
    assert suite.admin is not None

    async def one(number: int, policy: str = "", salt: str = "") -> router.GenerateResponse:
        message = router.GenerateRequest(
            tokens=router.TokenIds(ids=[3 + (number + position) % 50 for position in range(40)]),
            sampling=sampling.SamplingParams(max_tokens=8, ignore_eos=True),
            cache_salt=salt,
        )
        metadata = (("x-microserve-policy", policy),) if policy else ()
        reply = await suite.router.Complete(  # type: ignore[union-attr]
            router.CompleteRequest(request=message), timeout=120, metadata=metadata
        )
        return reply.response

    alone = await asyncio.gather(*(one(number, "data_parallel", "alone") for number in range(40)))
    wanted = [list(answer.token_ids) for answer in alone]
    for name in ("data_parallel", "context_aware", "balanced", "adaptive", "disaggregated"):
        running = [asyncio.create_task(one(number)) for number in range(40)]
        assert (await suite.admin.SetPolicy(admin.SetPolicyRequest(name=name))).policy.current
        assert (await one(0)).policy == name
        assert [list(answer.token_ids) for answer in await asyncio.gather(*running)] == wanted
    await goes_on(suite)


async def goes_on(suite: Suite) -> None:
    answer = await ask(suite, [5, 6, 7, 8], "disaggregated", max_tokens=3)
    assert len(answer.token_ids) == 3
    for at in suite.engines:
        await wait_for_load(at, idle)
