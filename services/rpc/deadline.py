"""Deadlines do not cross hops by themselves: a handler reads what is left and passes it on."""

from __future__ import annotations

from typing import Any

import grpc.aio


def time_left(context: grpc.aio.ServicerContext[Any, Any]) -> float | None:
    """Seconds until the call's deadline, never negative; None if the caller set none."""
    left: float | None = context.time_remaining()
    return None if left is None else max(left, 0.0)


def earlier(left_s: float | None, limit_s: float | None) -> float | None:
    """The shorter of two bounds in seconds, where None is no bound."""
    given = [bound for bound in (left_s, limit_s) if bound is not None]
    return min(given) if given else None
