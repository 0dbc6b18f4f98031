"""Checked reading of JSON files that came with a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.engine.model.errors import ModelCorrupt


def read_text(path: Path) -> str:
    """The text in `path`. Raises ModelCorrupt naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path} cannot be read as text: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelCorrupt naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} holds no JSON object.")
    return value


@dataclass(frozen=True, slots=True)
class Fields:
    """Checked access to the values of one JSON object; every complaint is ModelCorrupt and names `path`."""

    values: Mapping[str, Any]
    path: Path

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer from `least` to `most`; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ModelCorrupt(f"{self.path}: {name} must be an integer from {least} to {most}, not {value!r}.")
        return value

    def optional_count(self, name: str) -> int | None:
        """A positive integer, or None if it is missing or null."""
        return None if self.values.get(name) is None else self.count(name)

    def positive(self, name: str, default: float | None = None) -> float:
        """A positive number; null counts as missing."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ModelCorrupt(f"{self.path}: {name} must be a positive number, not {value!r}.")
        return float(value)

    def optional_positive(self, name: str) -> float | None:
        """A positive number, or None if it is missing or null."""
        return None if self.values.get(name) is None else self.positive(name)

    def part(self, name: str) -> dict[str, Any]:
        """A JSON object, empty if it is missing or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise ModelCorrupt(f"{self.path}: {name} must be an object, not {value!r}.")
        return dict(value or {})

    def objects(self, name: str) -> list[dict[str, Any]]:
        """A list of JSON objects, empty if it is missing or null."""
        value = self.values.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise ModelCorrupt(f"{self.path}: {name} must be a list of objects.")
        return list(value or ())
