"""Which linear layers a model gets."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.model.linear.linear import DENSE, Linear, LinearMaker


def linear_maker(device: torch.device, dtype: torch.dtype, num_threads: int, in_bytes: bool) -> LinearMaker:
    """The fastest layers for a device and dtype; `in_bytes` keeps weights in bytes, on the CPU in float32 only."""
    if device.type != "cpu" or dtype != torch.float32:
        return DENSE
    # Here, because numba and its machine code take 0.5 s to load and engines on a GPU never need them.
    from services.engine.kernels.team import team_of
    from services.engine.model.linear.tiled import ByteLinear, TiledLinear

    kind, team = ByteLinear if in_bytes else TiledLinear, team_of(num_threads)

    def make(weight: Tensor, bias: Tensor | None) -> Linear:
        return kind(weight, bias, team)

    return LinearMaker(make, " int8" if in_bytes else "", team)
