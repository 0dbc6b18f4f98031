"""A record of every verb that has ended, by the names that its caller and the caller's client have for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from services.engine.core.api import RequestKey
from services.protocol.errors import Code, ServiceError

log = logging.getLogger(__name__)

# What is the engine's own fault. All else is for those who look for one request.
_FAULTS = (Code.INTERNAL, Code.DATA_LOSS)


@contextmanager
def logged(verb: str, key: RequestKey) -> Iterator[None]:
    """The block carries the verb out."""
    try:
        yield
    except asyncio.CancelledError:
        log_end(verb, key, "CANCELLED")
        raise
    except Exception as error:
        log_failure(verb, key, error)
        raise
    log_end(verb, key, "OK")


def log_failure(verb: str, key: RequestKey, error: Exception) -> None:
    """It ended with an error."""
    code, reason = (error.code, error.reason) if isinstance(error, ServiceError) else (Code.INTERNAL, "INTERNAL")
    log_end(verb, key, reason, logging.WARNING if code in _FAULTS else logging.DEBUG)


def log_end(verb: str, key: RequestKey, outcome: str, level: int = logging.DEBUG) -> None:
    """`outcome` is OK, how a sequence finished, or the reason of an error."""
    if log.isEnabledFor(level):
        names = {"request": key.client_request_id, "owner": key.owner_id, "call": key.request_id}
        log.log(level, "call ended", extra={"fields": {"verb": verb, "outcome": outcome, **names}})
