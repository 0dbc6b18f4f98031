"""Programs compared on shares of the traffic, and the way back to the last good one."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import grpc.aio
import pytest
from microserve.router.v1 import admin_pb2

from services.router.programs.results import Distribution
from services.rpc.status import RemoteError, from_rpc_error
from tests.fakes import FakeBug, Fault
from tests.router.harness import PROMPT, Running, failing, model, running
from tests.router.test_admin import UPLOADED, use

BROKEN = "async def policy(request, fleet):\n    raise RuntimeError\n    yield\n"


async def split(suite: Running, **percents: float) -> admin_pb2.Split:
    shares = [admin_pb2.PolicyShare(policy=name, percent=percent) for name, percent in percents.items()]
    try:
        return (await suite.admin.SplitPolicies(admin_pb2.SplitPoliciesRequest(shares=shares))).split
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def roll_back(suite: Running) -> admin_pb2.PolicyInfo:
    try:
        return (await suite.admin.RollBackPolicy(admin_pb2.RollBackPolicyRequest())).policy
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def results(suite: Running) -> dict[str, admin_pb2.SplitArm]:
    got = (await suite.admin.GetSplit(admin_pb2.GetSplitRequest())).split
    return {arm.policy: arm for arm in got.arms}


@pytest.mark.slow
async def test_each_arm_gets_its_percentage_and_its_results() -> None:
    async with running() as suite:
        begun = await split(suite, disaggregated=20, context_aware=5)
        assert begun.active
        assert [(arm.policy, arm.percent) for arm in begun.arms] == [
            ("data_parallel", 75),
            ("disaggregated", 20),
            ("context_aware", 5),
        ]
        served = Counter([(await suite.generate()).policy for _ in range(100)])
        for arm in begun.arms:
            assert abs(served[arm.policy] - arm.percent) <= 2
        await suite.generate(policy="disaggregated")  # named by the client: no part of the comparison
        arms = await results(suite)
        assert {name: dict(arm.request_count_by_code) for name, arm in arms.items()} == {
            name: {"OK": count} for name, count in served.items()
        }
        for name, arm in arms.items():
            assert arm.ttft.count == arm.tpot.count == arm.jct.count == served[name]
            assert 0 < arm.ttft.mean.ToNanoseconds() < arm.jct.mean.ToNanoseconds()
            assert arm.ttft.p50.ToNanoseconds() <= arm.ttft.p99.ToNanoseconds()
            assert arm.tpot.mean.ToNanoseconds() > 0


async def test_a_request_counts_for_one_arm_however_many_answers_it_wants() -> None:
    async with running() as suite:
        await split(suite, disaggregated=50)
        for _ in range(4):
            await suite.generate(n=8)
        for arm in (await results(suite)).values():
            assert dict(arm.request_count_by_code) == {"OK": 2}


async def test_errors_are_counted_for_the_arm_that_had_them() -> None:
    async with running() as suite:
        await split(suite, disaggregated=50)
        suite.first.faults["RemoteSend"] = Fault(FakeBug("no sending today"))
        suite.engines[1].faults["RemoteSend"] = Fault(FakeBug("no sending today"))
        for number in range(10):
            with suppress(RemoteError):
                await suite.generate(cache_salt=str(number))
        arms = await results(suite)
        assert dict(arms["data_parallel"].request_count_by_code) == {"OK": 5}
        assert dict(arms["disaggregated"].request_count_by_code) == {"INTERNAL": 5}
        assert arms["disaggregated"].jct.count == 0


async def test_setting_a_policy_ends_the_split_and_keeps_its_results() -> None:
    async with running() as suite:
        assert not (await suite.admin.GetSplit(admin_pb2.GetSplitRequest())).HasField("split")
        await split(suite, disaggregated=100)
        assert (await suite.generate()).policy == "disaggregated"
        await use(suite, "context_aware")
        assert (await suite.generate()).policy == "context_aware"
        ended = (await suite.admin.GetSplit(admin_pb2.GetSplitRequest())).split
        assert not ended.active
        assert dict((await results(suite))["disaggregated"].request_count_by_code) == {"OK": 1}
        await split(suite, disaggregated=100)
        assert not (await split(suite)).active
        assert (await suite.generate()).policy == "context_aware"


@pytest.mark.parametrize(
    ("shares", "code", "reason"),
    [
        ({"nope": 10.0}, "NOT_FOUND", "UNKNOWN_POLICY"),
        ({"balanced:7": 10.0}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"disaggregated": 0.0}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"disaggregated": float("nan")}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"disaggregated": 60.0, "balanced": 60.0}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"data_parallel": 10.0}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({f"balanced:0.{number}": 1.0 for number in range(1, 10)}, "INVALID_ARGUMENT", "BAD_POLICY"),
        ({"": 10.0}, "INVALID_ARGUMENT", "BAD_POLICY"),
    ],
)
async def test_shares_that_make_no_sense_change_nothing(shares: dict[str, float], code: str, reason: str) -> None:
    async with running() as suite:
        with failing(code, reason):
            await split(suite, **shares)
        assert (await suite.generate()).policy == "data_parallel"


async def test_one_call_restores_the_last_program_that_answered_with_the_code_it_had() -> None:
    async with running(takes_uploads=True) as suite:
        await use(suite, "mine", UPLOADED)
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        await use(suite, "mine", BROKEN)
        with failing("ABORTED", "POLICY_FAILED"):
            await suite.generate()
        await use(suite, "mine", BROKEN)
        restored = await roll_back(suite)
        assert (restored.name, restored.current) == ("mine", True)
        assert (await suite.admin.GetPolicy(admin_pb2.GetPolicyRequest(name="mine"))).source == UPLOADED
        assert list((await suite.generate()).token_ids) == model().generate(PROMPT, 8)
        assert (await roll_back(suite)).name == "data_parallel"  # nothing earlier has answered: the first
        with failing("FAILED_PRECONDITION", "NO_EARLIER_POLICY"):
            await roll_back(suite)


def test_a_distribution_is_of_what_there_is() -> None:
    assert Distribution.of([]) == Distribution()
    assert Distribution.of([3.0]) == Distribution(1, 3.0, 3.0, 3.0)
    assert Distribution.of(range(100, 0, -1)) == Distribution(100, 50.5, 51, 100)
