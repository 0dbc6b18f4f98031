"""Documents that name files and flags name those that exist, and all of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from services.cli.main import app
from services.engine.config import EngineConfig
from services.kvtransfer.config import KvTransferConfig
from services.router.config import RouterConfig

ROOT = Path(__file__).resolve().parents[2]
STRUCTURE = (ROOT / "docs/structure.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Every program has --help; then those of pip, of the benchmarks under bench/, and of AIPerf.
BENCH_FLAGS = ("append", "minutes", "policies", "full", "servers", "loads", "parts", "python", "tokens")
AIPERF_FLAGS = ("url", "endpoint-type", "streaming", "tokenizer", "concurrency", "request-count", "isl", "osl", "ui")
TOOL_FLAGS = {"--" + name for name in ("help", "no-deps", *BENCH_FLAGS, *AIPERF_FLAGS)}
SERVICES = ["protocol", "rpc", "engine", "kvtransfer", "router", "cli"]


@pytest.mark.parametrize("service", SERVICES)
def test_structure_has_a_sentence_for_every_module(service: str) -> None:
    (section,) = re.findall(rf"^## services/{service}:.*?(?=^## |\Z)", STRUCTURE, re.MULTILINE | re.DOTALL)
    listed = re.findall(r"^- `([\w/]+\.py)` .{6,}", section, re.MULTILINE)
    folder = ROOT / "services" / service
    actual = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert set(listed) == actual
    assert len(listed) == len(actual)


@pytest.mark.parametrize(
    ("row", "config"), [("router", RouterConfig), ("engine-0", EngineConfig), ("kvtransfer", KvTransferConfig)]
)
def test_flags_of_the_readme_exist(row: str, config: type) -> None:
    (flags,) = re.findall(rf"^\| {row}\b.*\| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    known = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config)}
    named = set(re.findall(r"`(--[\w-]+)`", flags))
    assert named
    # The router's ports are options of `microserve up`.
    assert {flag.replace("--engines", "--engine") for flag in named} <= known


def test_flags_of_the_documents_exist() -> None:
    """Of whatever command: those of tools that are not ours are listed here."""
    fields = [
        field for config in (RouterConfig, EngineConfig, KvTransferConfig) for field in dataclasses.fields(config)
    ]
    known = {"--" + field.name.replace("_", "-") for field in fields}
    known |= {"--no-" + field.name.replace("_", "-") for field in fields if field.type == "bool"}
    known |= set(_options(typer.main.get_command(app))) | TOOL_FLAGS
    for document in DOCUMENTS:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"--\w+(, \w+)* *-->", "", document.read_text())))
        assert named <= known, f"{document.name}: {named - known}"


def test_metrics_of_the_documents_exist() -> None:
    """prometheus_client adds `_total` to the names of counters."""
    source = "".join(path.read_text() for path in (ROOT / "services").rglob("*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"\bmicroserve_[a-z]+_(\w+)", document.read_text()):
            declared = re.search(rf'["_]{name.removesuffix("_total")}(_total)?"', source)
            assert declared, f"{document.name} names a metric {name}"


def _options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from parameter.opts
    for each in getattr(command, "commands", {}).values():
        yield from _options(each)


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
