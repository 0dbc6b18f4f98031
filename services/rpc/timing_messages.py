"""Spans of time and an engine's account of a verb as messages, and back."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from microserve.types.v1 import sampling_pb2

from services.protocol.timing import Timing


def duration_message(seconds: float) -> Duration:
    """Seconds as a message; what is below zero becomes zero."""
    whole, nanos = divmod(max(0, round(seconds * 1e9)), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)


def seconds_of(message: Duration) -> float:
    """The inverse of `duration_message`."""
    return message.seconds + message.nanos / 1e9


def timing_message(timing: Timing) -> sampling_pb2.Timing:
    """An account as a message."""
    return sampling_pb2.Timing(
        matched_token_count=timing.matched_tokens,
        transferred_token_count=timing.transferred_tokens,
        computed_token_count=timing.computed_tokens,
        generated_token_count=timing.generated_tokens,
        transferred_bytes=timing.transferred_bytes,
        queue=duration_message(timing.queue_s),
        prefill=duration_message(timing.prefill_s),
        transfer=duration_message(timing.transfer_s),
        total=duration_message(timing.total_s),
        preemption_count=timing.preemptions,
    )


def timing_of(message: sampling_pb2.Timing) -> Timing:
    """The inverse of `timing_message`."""
    return Timing(
        matched_tokens=message.matched_token_count,
        transferred_tokens=message.transferred_token_count,
        computed_tokens=message.computed_token_count,
        generated_tokens=message.generated_token_count,
        transferred_bytes=message.transferred_bytes,
        queue_s=seconds_of(message.queue),
        prefill_s=seconds_of(message.prefill),
        transfer_s=seconds_of(message.transfer),
        total_s=seconds_of(message.total),
        preemptions=message.preemption_count,
    )
