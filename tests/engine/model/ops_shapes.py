"""Sizes of decoders that operations are compared at."""

from __future__ import annotations

import dataclasses

from services.engine.model.config import Activation, ModelConfig
from services.engine.model.loader import LoadedModel

Shape = tuple[int, int, int, int, int, bool, Activation]
# Hidden, intermediate, heads, kv heads, elements of a head, norm of heads, activation.
SHAPES: list[Shape] = [
    (48, 80, 6, 2, 8, False, "silu"),
    (640, 1100, 4, 1, 80, True, "gelu_tanh"),
    (100, 1025, 3, 3, 20, True, "gelu"),
    (1024, 3072, 16, 8, 128, True, "silu"),
]


def config_of(tiny: LoadedModel, shape: Shape) -> ModelConfig:
    hidden, intermediate, heads, kv_heads, head_dim, head_norm, activation = shape
    assert isinstance(tiny.config, ModelConfig)
    return dataclasses.replace(
        tiny.config, hidden_size=hidden, intermediate_size=intermediate, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, query_key_norm=head_norm, activation=activation,
    )  # fmt: skip
