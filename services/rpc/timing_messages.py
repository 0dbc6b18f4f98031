"""Spans of time and an engine's account of a verb as messages, and back."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from microserve.types.v1 import sampling_pb2

from services.protocol.timing import Timing


def duration_message(seconds: float) -> Duration:
    """Seconds as a message; what is below zero becomes zero."""
    message = Duration()
    set_duration(message, seconds)
    return message


def set_duration(message: Duration, seconds: float) -> None:
    """The same in place, as a field of a message, which has it then: several times as quick as one to be copied."""
    message.seconds, message.nanos = divmod(max(0, round(seconds * 1e9)), 1_000_000_000)


def seconds_of(message: Duration) -> float:
    """The inverse of `duration_message`."""
    return message.seconds + message.nanos / 1e9


def timing_message(timing: Timing) -> sampling_pb2.Timing:
    """An account as a message."""
    message = sampling_pb2.Timing()
    set_timing(message, timing)
    return message


def set_timing(message: sampling_pb2.Timing, timing: Timing) -> None:
    """The same in place."""
    message.matched_token_count = timing.matched_tokens
    message.transferred_token_count = timing.transferred_tokens
    message.computed_token_count = timing.computed_tokens
    message.generated_token_count = timing.generated_tokens
    message.transferred_bytes = timing.transferred_bytes
    set_duration(message.queue, timing.queue_s)
    set_duration(message.prefill, timing.prefill_s)
    set_duration(message.transfer, timing.transfer_s)
    set_duration(message.total, timing.total_s)
    message.preemption_count = timing.preemptions


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
