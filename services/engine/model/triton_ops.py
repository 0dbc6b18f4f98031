"""The operations of a decoder on a GPU, fused: norms, rotation with the write of KV, activation; the rest by torch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from services.engine.attention.pages import PagedKv
from services.engine.model import triton_ops_kernels as kernels
from services.engine.model.config import Activation, ModelConfig
from services.engine.model.ops import Step, TorchOps
from services.engine.model.rope import RotaryTable

_KINDS: dict[Activation, int] = {
    "silu": kernels.SILU.value,
    "gelu_tanh": kernels.GELU_TANH.value,
    "gelu": kernels.GELU.value,
}
ELEMENTS = 1024  # of a program that may have as many as it likes
ELEMENTS_A_WARP = 512  # of a norm, whose program has a whole row
MOST_WARPS = 16


class TritonOps(TorchOps):
    """Nothing waits for the device, so steps are queued and captured. See Ops.

    Launches say enable_fp_fusion, because Triton 3.9 warns where it is not said, and 3.10 takes another default.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._kind = _KINDS[config.activation]

    def norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        """See Ops."""
        return self.add_norm(rows, None, weight)

    def add_norm(self, hidden: Tensor, added: Tensor | None, weight: Tensor) -> Tensor:
        """See Ops."""
        (num_rows, size), other = hidden.shape, hidden if added is None else added
        normed = torch.empty(num_rows, size, dtype=hidden.dtype, device=hidden.device)
        block = triton.next_power_of_2(size)
        kernels.add_norm[(num_rows,)](
            hidden, other, weight, normed,
            self._config.norm_eps,
            *hidden.stride(), *other.stride(), size,
            SIZE=size, BLOCK=block, HAS_ADDED=added is not None,
            num_warps=min(max(block // ELEMENTS_A_WARP, 1), MOST_WARPS), enable_fp_fusion=True,
        )  # fmt: skip
        return normed

    def rotate_and_store(
        self, step: Step, layer: int, projected: Tensor, query_key_norm: Tensor | None, table: RotaryTable
    ) -> Tensor:
        """See Ops."""
        if not isinstance(step.attention, PagedKv):
            return super().rotate_and_store(step, layer, projected, query_key_norm, table)
        config, pool, num_rows = self._config, step.attention.kv[layer], projected.shape[0]
        all_heads, half = config.num_heads + 2 * config.num_kv_heads, config.head_dim // 2
        query = torch.empty(num_rows, config.num_heads, config.head_dim, dtype=projected.dtype, device=projected.device)
        block = triton.next_power_of_2(half)
        heads = min(max(ELEMENTS // (2 * block), 1), triton.next_power_of_2(all_heads))
        kernels.rotate_and_store[(num_rows, triton.cdiv(all_heads, heads))](
            projected, query, pool, table.cosine if query_key_norm is None else query_key_norm,
            table.cosine, table.sine, step.batch.positions, step.batch.slots,
            config.norm_eps, step.attention.page_size,
            *projected.stride(), table.cosine.stride(0), *pool.stride(),
            NUM_HEADS=config.num_heads, NUM_KV_HEADS=config.num_kv_heads, HALF=half,
            HEADS=heads, BLOCK=block, HAS_NORM=query_key_norm is not None,
            enable_fp_fusion=True,
        )  # fmt: skip
        if step.on_layer is not None:
            step.on_layer(layer)
        return query

    def activate(self, gate_up: Tensor) -> Tensor:
        """See Ops."""
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        result = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
        kernels.activate[(num_rows, triton.cdiv(size, ELEMENTS))](
            gate_up, result,
            *gate_up.stride(),
            SIZE=size, BLOCK=ELEMENTS, KIND=self._kind, enable_fp_fusion=True,
        )  # fmt: skip
        return result
