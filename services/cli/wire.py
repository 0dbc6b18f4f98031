"""What commands ask as messages of router.v1, and what it answers as plain values."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from microserve.router.v1 import admin_pb2, router_pb2
from microserve.types.v1 import sampling_pb2

from services.cli.errors import CliError
from services.cli.values import (
    Answer,
    Arm,
    Engine,
    Explanation,
    Leg,
    Move,
    Option,
    Planner,
    Policy,
    Question,
    Split,
    Topic,
)


def request_message(question: Question) -> router_pb2.GenerateRequest:
    """A question as RouterService takes it."""
    request = router_pb2.GenerateRequest(
        model=question.model,
        sampling=sampling_pb2.SamplingParams(
            temperature=question.temperature, max_tokens=question.max_tokens, seed=question.seed or 0
        ),
        seed_given=question.seed is not None,
    )
    if question.raw:
        request.text = question.text
    else:
        request.chat.messages.add(role="user", content=question.text)
    return request


def to_answer(pieces: list[router_pb2.GenerateResponse]) -> Answer:
    """The pieces put together. CliError if the last one is missing."""
    if not pieces or not pieces[-1].finish_reason:
        raise CliError("the router ended the answer without saying why")
    first, last = pieces[0], pieces[-1]
    return Answer(
        text="".join(piece.text for piece in pieces),
        request_id=first.request_id,
        policy=first.policy,
        finish_reason=_name(sampling_pb2.FinishReason.Name(last.finish_reason), "FINISH_REASON_"),
        prompt_tokens=last.usage.prompt_token_count,
        cached_tokens=last.usage.cached_token_count,
        output_tokens=last.usage.output_token_count,
        legs=tuple(to_leg(leg) for leg in last.legs),
    )


def to_leg(leg: sampling_pb2.Leg) -> Leg:
    """One verb's account."""
    timing = leg.timing
    return Leg(
        verb=_name(sampling_pb2.Verb.Name(leg.verb), "VERB_"),
        engine=leg.engine,
        begin=leg.range.begin,
        end=leg.range.end,
        matched=timing.matched_token_count,
        transferred=timing.transferred_token_count,
        computed=timing.computed_token_count,
        generated=timing.generated_token_count,
        transferred_bytes=timing.transferred_bytes,
        elapsed_ms=_milliseconds(leg.elapsed),
        first_token_ms=_milliseconds(leg.first_token) if leg.HasField("first_token") else None,
    )


def to_engine(engine: admin_pb2.EngineStatus) -> Engine:
    """One engine of the fleet."""
    info, load = engine.info, engine.load
    known = engine.HasField("load")
    return Engine(
        name=info.engine_name,
        address=engine.address,
        healthy=engine.healthy,
        problem=engine.problem,
        model=info.model,
        device=info.device,
        running=load.running_sequence_count if known else None,
        waiting=load.waiting_sequence_count + load.waiting_for_kv_count if known else None,
        reservations=load.reservation_count if known else None,
        pages_free=load.pages.free if known else None,
        pages_cached=load.pages.cached if known else None,
        pages_total=load.pages.total if known else None,
        draining=load.draining,
    )


def to_policy(policy: admin_pb2.PolicyInfo) -> Policy:
    """One program."""
    return Policy(policy.name, policy.summary, policy.current, policy.file)


def to_split(split: admin_pb2.Split) -> Split:
    """A split with its results."""
    return Split(
        split.active,
        tuple(
            Arm(
                policy=arm.policy,
                percent=arm.percent,
                requests=dict(arm.request_count_by_code),
                ttft_mean_ms=_milliseconds(arm.ttft.mean),
                ttft_p99_ms=_milliseconds(arm.ttft.p99),
                tpot_mean_ms=_milliseconds(arm.tpot.mean),
                jct_mean_ms=_milliseconds(arm.jct.mean),
                jct_p99_ms=_milliseconds(arm.jct.p99),
            )
            for arm in split.arms
        ),
    )


def to_planner(reply: admin_pb2.GetPlannerResponse) -> Planner:
    """What the planner sees and did."""
    return Planner(
        planner=reply.planner,
        problem=reply.problem,
        age_s=reply.age.ToNanoseconds() / 1e9,
        looks=reply.look_count,
        topics=tuple(
            Topic(
                each.name,
                each.model,
                each.token_count,
                each.requests_per_s,
                tuple(each.homes),
                dict(each.cached_token_count),
            )
            for each in reply.topics
        ),
        moves=tuple(map(_move, reply.moves)),
        moves_by_code=dict(reply.move_count_by_code),
        programs=tuple(map(to_policy, reply.programs)),
    )


def _move(move: admin_pb2.PlannerMove) -> Move:
    return Move(
        age_s=move.age.ToNanoseconds() / 1e9,
        topic=move.topic,
        source=move.source_engine,
        target=move.target_engine,
        tokens=move.token_count,
        why=move.why,
        code=move.code,
        moved_tokens=move.moved_token_count,
        moved_bytes=move.moved_bytes,
        elapsed_ms=_milliseconds(move.elapsed),
    )


def to_explanation(request_id: str, reply: admin_pb2.ExplainRequestResponse) -> Explanation:
    """Why a request ran where it did."""
    return Explanation(
        request_id=request_id,
        policy=reply.policy,
        code=reply.code,
        chosen=_option(reply.chosen) if reply.HasField("chosen") else None,
        alternatives=tuple(map(_option, reply.alternatives)),
        weighed=reply.weighed_count,
        ttft_ms=_milliseconds(reply.ttft) if reply.HasField("ttft") else None,
        jct_ms=_milliseconds(reply.jct),
        output_tokens=reply.output_token_count,
        legs=tuple(map(to_leg, reply.legs)),
    )


def _option(option: admin_pb2.PlacementOption) -> Option:
    return Option(
        pattern=option.pattern,
        decode=option.decode_engine,
        prefill=option.prefill_engine,
        split=option.split,
        hold_ms=_milliseconds(option.hold),
        wait_ms=_milliseconds(option.wait),
        compute_ms=_milliseconds(option.compute),
        transfer_ms=_milliseconds(option.transfer),
        decode_ms=_milliseconds(option.decode),
        delay_ms=_milliseconds(option.delay),
        ttft_ms=_milliseconds(option.ttft),
        jct_ms=_milliseconds(option.jct),
        cost_ms=_milliseconds(option.cost),
    )


def _name(value: str, prefix: str) -> str:
    return value.removeprefix(prefix).lower()


def _milliseconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e6
