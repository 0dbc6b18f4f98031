"""What AdminService shows, as messages of router.v1."""

from __future__ import annotations

from collections.abc import Sequence

from microserve.router.v1 import admin_pb2

from services.router.cost.decision import Option
from services.router.planning.host import PlannerStatus
from services.router.planning.mover import MoveRecord
from services.router.planning.topics import Topic
from services.router.planning.view import View
from services.router.programs.program import Program
from services.router.programs.results import Distribution
from services.router.programs.split import Arm, Split
from services.router.traces import Trace
from services.router.wire import leg_to_wire
from services.rpc.timing_messages import duration_message


def split_to_wire(split: Split | None) -> admin_pb2.Split | None:
    """With what came of each arm so far."""
    return None if split is None else admin_pb2.Split(active=not split.ended, arms=map(_arm, split.arms))


def explanation_to_wire(trace: Trace) -> admin_pb2.ExplainRequestResponse:
    """What was weighed, and what came of it."""
    message = admin_pb2.ExplainRequestResponse(
        policy=trace.policy,
        code=trace.code,
        ttft=None if trace.first_token_s is None else duration_message(trace.first_token_s),
        jct=duration_message(trace.duration_s),
        output_token_count=trace.output_tokens,
        legs=map(leg_to_wire, trace.legs),
    )
    if trace.decision is not None:
        message.chosen.CopyFrom(_option(trace.decision.chosen))
        message.alternatives.extend(map(_option, trace.decision.alternatives))
        message.weighed_count = trace.decision.num_weighed
    return message


def planner_to_wire(status: PlannerStatus, programs: Sequence[Program]) -> admin_pb2.GetPlannerResponse:
    """What the planner does, and the planners at hand."""
    return admin_pb2.GetPlannerResponse(
        planner=status.spec,
        problem=status.problem,
        age=duration_message(status.age_s),
        look_count=status.num_looks,
        topics=[_topic(topic, view) for view in status.views for topic in view.topics],
        moves=[_move(record, status.now_s) for record in status.moves],
        move_count_by_code=status.outcomes,
        programs=[
            admin_pb2.PolicyInfo(
                name=program.name,
                summary=program.summary,
                current=not status.problem and program.name == status.spec.partition(":")[0],
                file=program.file,
            )
            for program in programs
        ],
    )


def _topic(topic: Topic, view: View) -> admin_pb2.PlannerTopic:
    names = {site.address: site.name for site in view.sites}
    return admin_pb2.PlannerTopic(
        name=topic.name,
        model=view.model.name,
        token_count=topic.tokens,
        requests_per_s=topic.rate,
        homes=[names[address] for address in view.homes.get(topic.name, ()) if address in names],
        cached_token_count={site.name: site.cached[topic.name] for site in view.sites if site.cached[topic.name]},
    )


def _move(record: MoveRecord, now_s: float) -> admin_pb2.PlannerMove:
    return admin_pb2.PlannerMove(
        age=duration_message(now_s - record.at_s),
        topic=record.topic,
        source_engine=record.source,
        target_engine=record.target,
        token_count=record.tokens,
        why=record.why,
        code=record.code,
        moved_token_count=record.moved_tokens,
        moved_bytes=record.moved_bytes,
        elapsed=duration_message(record.elapsed_s),
    )


def _option(option: Option) -> admin_pb2.PlacementOption:
    return admin_pb2.PlacementOption(
        pattern=option.pattern.value,
        decode_engine=option.decode,
        prefill_engine=option.prefill,
        split=option.split,
        hold=duration_message(option.hold_s),
        wait=duration_message(option.wait_s),
        compute=duration_message(option.compute_s),
        transfer=duration_message(option.transfer_s),
        decode=duration_message(option.decode_s),
        delay=duration_message(option.delay_s),
        ttft=duration_message(option.ttft_s),
        jct=duration_message(option.jct_s),
        cost=duration_message(option.cost_s),
    )


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
        count=times.count,
        mean=duration_message(times.mean_s),
        p50=duration_message(times.p50_s),
        p99=duration_message(times.p99_s),
    )
