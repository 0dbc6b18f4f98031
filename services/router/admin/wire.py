"""What AdminService shows, as messages of router.v1."""

from __future__ import annotations

from microserve.router.v1 import admin_pb2

from services.router.programs.results import Distribution
from services.router.programs.split import Arm, Split
from services.router.wire import duration


def split_to_wire(split: Split | None) -> admin_pb2.Split | None:
    """With what came of each arm so far."""
    return None if split is None else admin_pb2.Split(active=not split.ended, arms=map(_arm, split.arms))


def _arm(arm: Arm) -> admin_pb2.SplitArm:
    results = arm.results
    return admin_pb2.SplitArm(
        policy=arm.program.spec,
        percent=arm.percent,
        request_count_by_code=results.codes,
        ttft=_distribution(results.ttft),
        tpot=_distribution(results.tpot),
        jct=_distribution(results.jct),
    )


def _distribution(times: Distribution) -> admin_pb2.TimeDistribution:
    return admin_pb2.TimeDistribution(
        count=times.count, mean=duration(times.mean_s), p50=duration(times.p50_s), p99=duration(times.p99_s)
    )
