"""Documents that name files and flags name those that exist, and all of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from services.engine.config import EngineConfig
from services.kvtransfer.config import KvTransferConfig
from services.router.config import RouterConfig

ROOT = Path(__file__).resolve().parents[2]
STRUCTURE = (ROOT / "docs/structure.md").read_text()
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


def test_links_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
