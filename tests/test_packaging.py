"""What pyproject.toml and constraints.txt promise, against the stubs and against each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Of these constraints.txt says nothing: they exist for some GPUs only.
GPU_EXTRAS = {"flash-attn", "nccl-cu12", "nixl"}


def pins() -> dict[str, Version]:
    """constraints.txt by normalised name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {name: Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    """All that are pinned."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(line for name in extras.keys() - GPU_EXTRAS for line in extras[name])]
    return [Requirement(line) for line in lines]


def generated_with(pattern: str) -> Version:
    """The newest version named in the stubs."""
    texts = (path.read_text() for path in (ROOT / "gen").rglob("*_pb2*.py"))
    return max(Version(match) for text in texts for match in re.findall(pattern, text))


def test_lower_bounds_are_what_the_stubs_ask_for_at_run_time() -> None:
    needed = {
        "grpcio": generated_with(r"GRPC_GENERATED_VERSION = '([\d.]+)'"),
        "protobuf": generated_with(r"# Protobuf Python Version: ([\d.]+)"),
    }
    bounds = {
        requirement.name: Version(next(iter(requirement.specifier)).version)
        for requirement in map(Requirement, PROJECT["dependencies"])
    }
    for name, version in needed.items():
        assert bounds[name] >= version


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    for requirement in requirements():
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert pinned[name] in requirement.specifier, requirement


def test_pins_have_no_local_version() -> None:
    assert not [name for name, version in pins().items() if version.local]
    assert pins()["torch"] == Version("2.13.0")
