"""How a model turns positions into angles, as its config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from services.engine.model.errors import ModelCorrupt, UnsupportedModel
from services.engine.model.families import FULL, SLIDING
from services.engine.model.json_fields import Fields


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary positions: the base of the frequencies, and how they are stretched beyond the trained context."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0  # how many times the longest wavelengths are stretched
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192  # tokens


def rope_by_layer_type(config: Mapping[str, Any], max_context: int, path: Path) -> dict[str, RopeConfig]:
    """The positions of layers that see everything and of those whose window slides.

    transformers 5 writes rope_parameters, one for each type of layer where they differ; before, rope_theta stood
    beside an optional rope_scaling, and rope_local_base_freq was the base of sliding layers, which are not stretched.
    """
    given = Fields(config, path).part("rope_parameters")
    if FULL in given or SLIDING in given:
        parts = Fields(given, path)
        return {kind: _parse(parts.part(kind), config, max_context, path) for kind in (FULL, SLIDING)}
    full = _parse(Fields(config, path).part("rope_scaling") | given, config, max_context, path)
    local = Fields(config, path).optional_positive("rope_local_base_freq")
    return {FULL: full, SLIDING: full if local is None else RopeConfig(local)}


def _parse(parameters: Mapping[str, Any], config: Mapping[str, Any], max_context: int, path: Path) -> RopeConfig:
    fields = Fields(parameters, path)
    theta = fields.positive("rope_theta", default=config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModel("Rotary positions over a part of the head are not supported.")
    match kind:
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, "linear", factor=fields.positive("factor"))
        case "llama3":
            low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
            if low >= high:
                raise ModelCorrupt(f"{path}: low_freq_factor {low} must be below high_freq_factor {high}.")
            original = fields.count("original_max_position_embeddings", default=max_context)
            return RopeConfig(theta, "llama3", fields.positive("factor"), low, high, original)
    raise UnsupportedModel(f"Rotary position scaling of type {kind} is not supported.")
