"""Records are one line and hold no secret."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from services.rpc import log


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # configure() closes what it replaces, and these are pytest's
    output = io.StringIO()
    log.configure("engine", stream=output)
    yield output
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("services").setLevel(logging.NOTSET)


def test_levels_are_of_our_own_records_and_libraries_never_tell_of_debug(stream: io.StringIO) -> None:
    def told() -> list[str]:
        stream.seek(0)
        stream.truncate()
        for name in ("services.engine.front", "library"):
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logging.getLogger(name).log(level, "x")
        lines = [dict(word.split("=", 1) for word in line.split()) for line in stream.getvalue().splitlines()]
        return [f"{line['logger'].partition('.')[0]}:{line['level']}" for line in lines]

    assert told() == ["services:info", "services:warning", "library:info", "library:warning"]
    log.configure("engine", level="debug", stream=stream)
    assert told() == ["services:debug", "services:info", "services:warning", "library:info", "library:warning"]
    log.configure("engine", level="warning", stream=stream)
    assert told() == ["services:warning", "library:warning"]


def test_record_is_one_line_of_pairs(stream: io.StringIO) -> None:
    logging.getLogger("a.b").warning("two\nlines", extra={"fields": {"pages": 3, "who": 'x "y"'}})
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert ' level=warning service=engine logger=a.b msg="two\\nlines" pages=3 who="x \\"y\\""' in line


def test_what_a_terminal_would_obey_is_escaped(stream: io.StringIO) -> None:
    """C1 controls, line separators that are no line feed, and changes of direction pass JSON as they are."""
    hostile = {"a": "\x9b2J\x7f", "b": "one\u2028two\x85three", "c": "\u202eabc", "d": "süß 猫"}
    logging.getLogger("a").warning("x", extra={"fields": hostile})
    line = stream.getvalue().removesuffix("\n")
    assert line.isprintable()
    assert line.endswith(r'a="\u009b2J\u007f" b="one\u2028two\u0085three" c="\u202eabc" d="süß 猫"')


def test_lines_of_readable_text_stay_readable(stream: io.StringIO) -> None:
    logging.getLogger("a").warning("x", extra={"fields": {"a": "süß\n\t猫", "b": "süß\n\x9b2J"}})
    line = stream.getvalue().removesuffix("\n")
    assert line.isprintable()
    assert line.endswith(r'a="süß\n\t猫" b="s\u00fc\u00df\n\u009b2J"')


def test_secrets_are_masked_and_bytes_are_hex(stream: io.StringIO) -> None:
    fields = {"secret": b"\x01", "ticket": "t", "api_key": "k", "epoch": b"\xab\xcd", "tokens": 5}
    logging.getLogger("a").info("x", extra={"fields": fields})
    assert "secret=*** ticket=*** api_key=*** epoch=abcd tokens=5" in stream.getvalue()


async def test_the_failure_of_a_task_that_nobody_awaits_is_told(stream: io.StringIO) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    failed = asyncio.create_task(fail(), name="failed")
    cancelled = asyncio.create_task(fail(), name="cancelled")
    cancelled.cancel()
    well = asyncio.create_task(asyncio.sleep(0), name="well")
    for task in (failed, cancelled, well):
        task.add_done_callback(log.log_failure)
    await asyncio.wait([failed, cancelled, well])
    (line,) = stream.getvalue().splitlines()
    assert 'msg="task failed" task=failed' in line
    assert "a bug" in line


def test_exception_stays_on_the_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("a").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: why" in stream.getvalue()
