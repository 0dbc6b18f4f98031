"""The choice of a decoder's operations at the start: fused ones, if they compute what plain torch does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.problem import WrongResult, uninitialized_is_nan
from services.engine.attention.stored import FLOAT8
from services.engine.batch import ForwardBatch
from services.engine.model.config import ModelConfig
from services.engine.model.ops import Ops, Step, TorchOps
from services.engine.model.rope import RotaryTable

NUM_ROWS, PAGE_SIZE, NUM_PAGES = 5, 16, 3
POSITIONS, SLOTS = (0, 1, 7, 30, 31), (17, 16, 47, 3, 40)  # of the rows; slots lie in all pages
APART = 16  # elements between rows: a kernel compiled for strides of 16 is then the one that serves
# Of the largest value. Plain torch rounds between its operations, the fused ones at their end.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Small differences may round apart, to neighbours among floats of eight bits: an eighth of the smaller one lies between
# them, or 2^-9 among the smallest.
FLOAT8_STEP, FLOAT8_LEAST_STEP = 2**-3, 2**-9
EXTREME = 1000.0  # what makes most keys and values too large for floats of eight bits

_log = logging.getLogger(__name__)


class _Unavailable(Exception):
    """The fused operations cannot be had here; the message is one phrase."""


def make_ops(config: ModelConfig, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> Ops:
    """Operations for a decoder that no team of threads computes. On a GPU the log says which and why."""
    if device.type != "cuda":
        return TorchOps(config)
    return choose_ops(config, device, dtype, kv_dtype, fused_ops)


def fused_ops(config: ModelConfig) -> Ops:
    """Raises _Unavailable where triton is missing."""
    try:
        from services.engine.model.triton_ops import TritonOps
    except ImportError:
        raise _Unavailable("triton is not installed") from None
    return TritonOps(config)


def choose_ops(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    make: Callable[[ModelConfig], Ops],
) -> Ops:
    """What `make` gives, if it computes what TorchOps does; TorchOps otherwise, whatever goes wrong."""
    began = time.monotonic()
    try:
        ops = make(config)
        check_ops(ops, config, device, dtype, kv_dtype)
    except _Unavailable as reason:
        _log.info("operations chosen", extra={"fields": {"ops": "torch", "why": str(reason)}})
    except Exception as error:  # whatever a compiler says, the engine serves with plain torch
        why = f"{type(error).__name__}: {error}"
        _log.warning("fused operations are broken", extra={"fields": {"ops": "torch", "why": why}})
    else:
        seconds = round(time.monotonic() - began, 1)
        fields = {"ops": type(ops).__name__, "why": "fused, and equal to plain torch", "seconds": seconds}
        _log.info("operations chosen", extra={"fields": fields})
        return ops
    return TorchOps(config)


@torch.inference_mode()
def check_ops(ops: Ops, config: ModelConfig, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Raises WrongResult, or what `ops` raises, unless it computes what TorchOps does at the sizes of the model.

    Rows lie apart in wider ones. Memory that is allocated and the pages that are not written are filled with NaN, so
    that what is forgotten and what is written elsewhere shows. KV is stored as it comes, and once so large that floats
    of eight bits do not reach, with a NaN in it.
    """
    random = torch.Generator().manual_seed(0)

    def rows(size: int) -> Tensor:
        return (torch.randn(NUM_ROWS, size + APART, generator=random) * 3).to(device, dtype)[:, :size]

    def weight(*size: int) -> Tensor:
        return (1 + torch.randn(size, generator=random)).to(device)

    hidden, added, norm = rows(config.hidden_size), rows(config.hidden_size), weight(config.hidden_size)
    num_rotated = config.num_heads + config.num_kv_heads
    projected = rows((num_rotated + config.num_kv_heads) * config.head_dim).contiguous()
    head_norm = weight(num_rotated, config.head_dim) if config.query_key_norm else None
    table = RotaryTable(config.layers[0].rope, config.head_dim, max(POSITIONS) + 1, device)
    gate_up = rows(2 * config.intermediate_size)
    extreme = projected * EXTREME
    extreme[-1, -config.head_dim :] = torch.nan

    def compute(each: Ops) -> dict[str, Tensor]:
        stream, (kv, extreme_kv) = hidden.clone(), (_pages(config, device, kv_dtype) for _ in range(2))
        results = {
            "norm": each.norm(hidden, norm),
            "norm after a sum": each.add_norm(stream, added, norm),
            "queries": each.rotate_and_store(_step(kv), 0, projected, head_norm, table),
            "activation": each.activate(gate_up),
        }
        each.rotate_and_store(_step(extreme_kv), 0, extreme, head_norm, table)
        return results | {"sum": stream, "pages": kv, "pages of large numbers": extreme_kv}

    expected = compute(TorchOps(config))
    with uninitialized_is_nan():
        actual = compute(ops)
    for name, wanted in expected.items():
        relative, absolute = 0.0, TOLERANCES[dtype] * float(wanted.float().nan_to_num().abs().max())
        if wanted.dtype == FLOAT8:
            relative, absolute = FLOAT8_STEP, absolute + FLOAT8_LEAST_STEP
        wrong = ~torch.isclose(actual[name].float(), wanted.float(), relative, absolute, equal_nan=True)
        if actual[name].dtype != wanted.dtype or bool(wrong.any()):
            raise WrongResult(f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ from plain torch's")


def _pages(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pages of NaN."""
    shape = (1, NUM_PAGES, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _step(kv: Tensor) -> Step:
    """Rows of several sequences over pages."""
    device = kv.device
    positions, slots = (torch.tensor(numbers, device=device) for numbers in (POSITIONS, SLOTS))
    batch = ForwardBatch(
        token_ids=positions,
        positions=positions,
        slots=slots,
        query_starts=torch.arange(NUM_ROWS + 1, dtype=torch.int32),
        context_lengths=torch.tensor(POSITIONS, dtype=torch.int32) + 1,
        block_tables=torch.zeros(NUM_ROWS, 1, dtype=torch.int32, device=device),
        logits_rows=positions,
    )
    return Step(batch, GatherSdpaAttention(kv))
