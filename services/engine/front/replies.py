"""What the loop thread answered, as messages of engine.v1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from microserve.engine.v1 import engine_pb2
from microserve.types.v1 import kv_pb2, sampling_pb2

from services.engine.convert import to_logprobs, to_prompt_logprobs
from services.engine.core.api import CacheEvent, FinishReason, Load, ReservationInfo, Reserved, SequenceOutput
from services.engine.front.streams import Taken, VerbAnswer
from services.protocol.timing import Timing
from services.rpc.kv_messages import address_message, range_message
from services.rpc.status import to_error_message
from services.rpc.timing_messages import duration_message, timing_message

_FINISH_REASONS = {
    name: sampling_pb2.FinishReason.Value(f"FINISH_REASON_{name}")
    for name in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED)
}
MAX_LISTED_RESERVATIONS = 10_000
# A block hash takes 20 bytes on the wire, so a message stays well under gRPC's limit.
MAX_BLOCKS_PER_MESSAGE = 16_384


def to_reserved(reserved: Reserved) -> engine_pb2.PrepRecvResponse:
    """The answer to a PrepRecv."""
    return engine_pb2.PrepRecvResponse(
        address=address_message(reserved.address),
        matched_token_count=reserved.matched_tokens,
        lease=duration_message(reserved.lease_s),
        timing=timing_message(reserved.timing),
    )


def to_generated(output: SequenceOutput) -> engine_pb2.StartGenerateResponse:
    """New tokens of one sequence; its error, if any, travels otherwise."""
    timing = timing_message(output.timing) if output.timing is not None else None
    response = engine_pb2.StartGenerateResponse(token_ids=output.token_ids, timing=timing)
    if output.logprobs:
        response.logprobs.extend(to_logprobs(entry) for entry in output.logprobs)
    if output.prompt_logprobs is not None:
        response.prompt_logprobs.CopyFrom(to_prompt_logprobs(output.prompt_logprobs))
    if output.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[output.finish_reason]
    return response


def to_sent(timing: Timing) -> engine_pb2.RemoteSendResponse:
    """The answer to a RemoteSend."""
    return engine_pb2.RemoteSendResponse(timing=timing_message(timing))


def to_frame(taken: Taken) -> engine_pb2.SessionResponse:
    """One frame of a session."""
    return engine_pb2.SessionResponse(
        outputs=[_to_session_output(output) for output in taken.outputs],
        answers=[_to_answer(answer) for answer in taken.answers],
    )


def to_load(load: Load) -> engine_pb2.WatchLoadResponse:
    """The load as a message."""
    pages = load.pages
    return engine_pb2.WatchLoadResponse(
        running_sequence_count=load.running_sequences,
        waiting_sequence_count=load.waiting_sequences,
        waiting_for_kv_count=load.waiting_for_kv,
        queued_token_count=load.queued_tokens,
        context_token_count=load.context_tokens,
        reservation_count=load.reservations,
        pages=engine_pb2.PageCounts(
            free=pages.free,
            cached=pages.cached,
            held=pages.held,
            quarantined=pages.quarantined,
            total=pages.total,
        ),
        step_count=load.steps,
        draining=load.draining,
        work=engine_pb2.WorkDone(
            busy=duration_message(load.work.busy_s),
            prompt_token_count=load.work.prompt_tokens,
            prompt_context_token_count=load.work.prompt_context,
            row_count=load.work.rows,
            row_context_token_count=load.work.row_context,
        ),
    )


def to_reservation_list(infos: Sequence[ReservationInfo]) -> engine_pb2.ListReservationsResponse:
    """Live reservations, cut off where the contract says."""
    return engine_pb2.ListReservationsResponse(
        reservations=[_to_reservation_info(info) for info in infos[:MAX_LISTED_RESERVATIONS]]
    )


def to_cache_events(event: CacheEvent) -> Iterator[engine_pb2.WatchKvEventsResponse]:
    """A change as one message; a snapshot, which may be large, as one or more of the same sequence number."""
    if not event.snapshot:
        yield engine_pb2.WatchKvEventsResponse(
            sequence=event.sequence, stored=_to_blocks(event.stored), removed=_to_blocks(event.removed)
        )
        return
    for begin in range(0, max(1, len(event.stored)), MAX_BLOCKS_PER_MESSAGE):
        end = begin + MAX_BLOCKS_PER_MESSAGE
        yield engine_pb2.WatchKvEventsResponse(
            sequence=event.sequence,
            snapshot=True,
            snapshot_complete=end >= len(event.stored),
            stored=_to_blocks(event.stored[begin:end]),
        )


def _to_session_output(output: SequenceOutput) -> engine_pb2.SequenceOutput:
    message = engine_pb2.SequenceOutput(request_id=output.key.request_id)
    if output.error is None or output.has_news:
        message.output.CopyFrom(to_generated(output))
    if output.error is not None:
        message.error.CopyFrom(to_error_message(output.error))
    return message


def _to_answer(answer: VerbAnswer) -> engine_pb2.VerbAnswer:
    match answer.result:
        case Reserved() as reserved:
            return engine_pb2.VerbAnswer(request_id=answer.request_id, prep_recv=to_reserved(reserved))
        case Timing() as timing:
            return engine_pb2.VerbAnswer(request_id=answer.request_id, remote_send=to_sent(timing))
        case error:
            return engine_pb2.VerbAnswer(request_id=answer.request_id, error=to_error_message(error))


def _to_reservation_info(info: ReservationInfo) -> engine_pb2.ReservationInfo:
    return engine_pb2.ReservationInfo(
        reservation_id=info.reservation_id,
        owner_id=info.key.owner_id,
        request_id=info.key.request_id,
        state=engine_pb2.ReservationState.Value(f"RESERVATION_STATE_{info.state}"),
        window=range_message(info.window),
        committed=[range_message(part) for part in info.committed],
        lease_remaining=duration_message(info.lease_remaining_s),
        page_ids=info.page_ids,
    )


def _to_blocks(hashes: Iterable[bytes]) -> list[kv_pb2.BlockHash]:
    return [kv_pb2.BlockHash(value=value) for value in hashes]
