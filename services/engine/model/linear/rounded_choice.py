"""Who multiplies with weights of eight bits on a GPU: the kernel, if it computes what plain torch does."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.attention.problem import WrongResult, uninitialized_is_nan
from services.engine.model.linear.linear import Linear, LinearMaker
from services.engine.model.linear.rounded import Rounded, RoundedLinear, rounded

Make = Callable[[Rounded, Tensor | None], Linear]
ROWS = (1, 17, 40, 128)
SHAPES = ((40, 1_200), (8_224, 136))  # outputs and inputs: inputs are cut into pieces, and are not
# Of the largest value. The kernel rounds once, plain torch before and after it scales.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}

_log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """The kernel cannot be had here; the message is one phrase."""


def rounded_maker(device: torch.device, dtype: torch.dtype, kind: torch.dtype, name: str) -> LinearMaker:
    """Layers that keep weights in `kind`, int8 or float8_e4m3fn, which KV's digest calls `name`."""
    make = choose(device, dtype, kind, kernel_layers)
    return LinearMaker(lambda weight, bias: make(rounded(weight, kind), bias), f" {name}, a scale an output")


def kernel_layers() -> Make:
    """Raises _Unavailable where triton is missing."""
    try:
        from services.engine.model.linear.rounded_triton import TritonRoundedLinear
    except ImportError:
        raise _Unavailable("triton is not installed") from None
    return TritonRoundedLinear


def choose(device: torch.device, dtype: torch.dtype, kind: torch.dtype, find: Callable[[], Make]) -> Make:
    """What `find` gives, if it computes what RoundedLinear does; RoundedLinear otherwise, whatever goes wrong."""
    try:
        make = find()
        check(make, device, dtype, kind)
    except Exception as error:  # whatever a compiler says, the engine serves with plain torch
        why = str(error) if isinstance(error, _Unavailable) else f"{type(error).__name__}: {error}"
        _log.warning("rounded weights are multiplied by plain torch", extra={"fields": {"why": why}})
        return RoundedLinear
    return make


@torch.inference_mode()
def check(make: Make, device: torch.device, dtype: torch.dtype, kind: torch.dtype) -> None:
    """Raises WrongResult, or what the layers raise, unless they compute what RoundedLinear does."""
    random = torch.Generator().manual_seed(0)
    for num_out, num_in in SHAPES:
        weight = rounded(torch.randn(num_out, num_in, generator=random).to(device), kind)
        bias = torch.randn(num_out, generator=random).to(device, dtype)
        for layer, plain in ((make(weight, each), RoundedLinear(weight, each)) for each in (bias, None)):
            for num_rows in ROWS:
                rows = torch.randn(num_rows, num_in, generator=random).to(device, dtype)
                wanted = plain(rows).float()
                with uninitialized_is_nan():
                    difference = float((layer(rows).float() - wanted).abs().max() / wanted.abs().max())
                if not difference <= TOLERANCES[dtype]:  # NaN is not
                    raise WrongResult(f"{num_rows} rows differ by {difference:.2g} from plain torch's")
