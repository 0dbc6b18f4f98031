"""docs/errors.md says what the code does: every error once, with its code and reason, and none that does not exist."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import services
from services.protocol.errors import Code, ServiceError

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (\w+) \| `([A-Z_]+)` \| ([A-Z_]+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
# Roots and shells: they are never raised as they are, or speak for somebody else.
WITHOUT_A_ROW = {"ProtocolError", "EngineError", "KvTransferError", "RouterError", "RemoteError"}


def subclasses(root: type[ServiceError]) -> set[type[ServiceError]]:
    return {leaf for child in root.__subclasses__() for leaf in {child, *subclasses(child)}}


def errors_of_the_code() -> set[tuple[str, str, str]]:
    for module in pkgutil.walk_packages(services.__path__, "services."):
        if module.name.endswith("errors") or module.name.startswith("services.rpc."):
            importlib.import_module(module.name)
    return {
        (leaf.__module__.split(".")[1], leaf.reason, leaf.code.name)
        for leaf in subclasses(ServiceError)
        if leaf.__name__ not in WITHOUT_A_ROW and leaf.__module__.startswith("services.")
    }


def test_the_table_is_the_code() -> None:
    rows = ROW.findall((ROOT / "docs/errors.md").read_text())
    table = {(service, reason, code) for service, reason, code, _, _ in rows}
    assert len(table) == len(rows), "a row stands twice"
    assert table == errors_of_the_code()


def test_reasons_are_unambiguous() -> None:
    """A reason stands for one status code, whoever says it."""
    codes: dict[str, set[str]] = {}
    for _, reason, code in errors_of_the_code():
        codes.setdefault(reason, set()).add(code)
    assert {reason: found for reason, found in codes.items() if len(found) > 1} == {}


def test_every_row_tells_what_to_do() -> None:
    for service, reason, code, when, advice in ROW.findall((ROOT / "docs/errors.md").read_text()):
        assert code in Code.__members__, f"{service} {reason}"
        assert len(when) > 15, f"{service} {reason}"
        assert len(advice) > 3, f"{service} {reason}"
