"""Logging: one line a record on stderr, key=value, never a secret.

log = logging.getLogger(__name__)
log.info("reservation expired", extra={"fields": {"reservation": id, "age_s": 3.2}})
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

log = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")
_OWN = "services"  # what every module of ours is in
_SECRET = re.compile(r"secret|ticket|password|token$|api_?key", re.IGNORECASE)
_PLAIN = re.compile(r"[\w.:/+\-\[\]@*]+")


class KeyValueFormatter(logging.Formatter):
    """time=... level=... service=... logger=... msg=... key=value ... [exception=...]"""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        extra = getattr(record, "fields", None)
        if isinstance(extra, Mapping):
            fields.update(extra)
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_value(str(key), value)}" for key, value in fields.items())


def configure(service: str, *, level: str = "info", stream: TextIO | None = None) -> None:
    """Sends the records of this process to stderr (or `stream`) in the format above, those of `level`, one of LEVELS,
    and worse. Of libraries none of debug: these may show what is secret. May be called again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(KeyValueFormatter(service))
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler], force=True)
    logging.getLogger(_OWN).setLevel(least)


def log_failure(task: asyncio.Task[Any]) -> None:
    """A done-callback for a task whose outcome nobody reads: logs what it failed with. asyncio itself would only when
    the task is forgotten, and a process may end before."""
    if not task.cancelled() and (failure := task.exception()) is not None:
        log.error("task failed", exc_info=failure, extra={"fields": {"task": task.get_name()}})


def _value(key: str, value: object) -> str:
    """One word or one JSON string, so that a record is always one line. Bytes become hex, and text that a terminal may
    obey or break at (C1 controls, U+2028, changes of direction) is escaped; JSON escapes line feeds and tabs anyway."""
    if _SECRET.search(key):
        return "***"
    text = value.hex() if isinstance(value, bytes) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=not text.replace("\n", "").replace("\t", "").isprintable())
