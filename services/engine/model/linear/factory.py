"""Which linear layers a model gets."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.model.linear.blocks import Blocks, blocks_of
from services.engine.model.linear.form import WeightForm
from services.engine.model.linear.linear import DENSE, Linear, LinearMaker

_KINDS = {WeightForm.BYTES: (torch.int8, "int8"), WeightForm.FLOATS8: (torch.float8_e4m3fn, "fp8")}  # on GPUs


def linear_maker(device: torch.device, dtype: torch.dtype, num_threads: int, form: WeightForm) -> LinearMaker:
    """The fastest layers for a device and dtype; on the CPU only float32 leaves weights another form."""
    if device.type == "cuda" and form in _KINDS:
        from services.engine.model.linear.rounded_choice import rounded_maker

        return rounded_maker(device, dtype, *_KINDS[form])
    if device.type != "cpu" or dtype != torch.float32:
        return DENSE
    # Here, because numba and its machine code take 0.5 s to load and engines on a GPU never need them.
    from services.engine.kernels.team import team_of
    from services.engine.model.linear.block_linear import BlockLinear
    from services.engine.model.linear.tiled import Tiled, TiledLinear
    from services.engine.model.linear.trial import try_splits

    team = team_of(num_threads)
    activation_bytes = 2 if form is WeightForm.PACKED_16 else 1
    made: list[Tiled] = []

    def kept(layer: Tiled) -> Linear:
        made.append(layer)
        return layer

    def exact(weight: Tensor, bias: Tensor | None) -> Linear:
        return kept(TiledLinear(weight, bias, team))

    def packed(blocks: Blocks, bias: Tensor | None) -> Linear:
        return kept(BlockLinear(blocks, bias, team, activation_bytes))

    def rounded(weight: Tensor, bias: Tensor | None) -> Linear:
        return packed(blocks_of(weight), bias)

    def settle() -> None:
        try_splits(made, team)
        made.clear()

    if form is WeightForm.EXACT:
        return LinearMaker(exact, team=team, make_exact=exact, settle=settle)
    is_packed = form in (WeightForm.PACKED, WeightForm.PACKED_16)
    name = " int8" if activation_bytes == 1 else " int8 by int16"
    return LinearMaker(rounded, name, team, exact, packed if is_packed else None, settle)
