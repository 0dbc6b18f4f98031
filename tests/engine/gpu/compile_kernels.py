"""Compiles what engines launch for a GPU that need not be here: python -m tests.engine.gpu.compile_kernels CAPABILITY.

Triton's own launch path, up to the launch itself, so types, constants and alignment are those of an engine. One line a
compiled kernel: its name, the type of its rows, and the bytes of shared memory that a program takes.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.gpu.parts import decoding_batch, prompt_batch
from bench.gpu.shapes import LLAMA_8B, Shapes
from services.engine.attention import triton_kernels, triton_prefill_kernels  # noqa: F401, not to be interpreted
from services.engine.attention.problem import FORMS, WrongResult
from services.engine.attention.stored import FLOAT8
from services.engine.attention.triton_prefill import TritonPrefillAttention
from services.engine.model.config import parse_config
from services.engine.model.linear.rounded import rounded
from services.engine.model.linear.rounded_triton import TILES, TritonRoundedLinear
from services.engine.model.ops_choice import check_ops
from services.engine.model.triton_ops import TritonOps

CPU = torch.device("cpu")
MODELS: tuple[dict[str, Any], ...] = (
    LLAMA_8B,
    {"architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 1,
     "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "eos_token_id": 1},
    {"architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 1,
     "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "eos_token_id": 1},
)  # fmt: skip
# Of a layer that is cut into pieces, and of one that is not.
WEIGHTS = ((4096, 1024), (28672, 1024))


class NoGpu:
    """What a launch asks a driver for before it launches."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    capability = int(sys.argv[1])
    triton.runtime.driver.set_active(NoGpu(capability))
    triton.knobs.runtime.interpret = True  # attention would ask for a GPU; kernels are made to be compiled already
    JITFunction.__getitem__ = _compile_only
    for facts in MODELS:
        config = parse_config(facts, {}, CPU)
        for dtype, kv_dtype in _types(capability, is_first=facts is MODELS[0]):
            shapes = Shapes(config, dtype, 16, 2, 40, 2, 40, 1, 1)
            with contextlib.suppress(WrongResult):  # nothing is computed
                check_ops(TritonOps(config), config, CPU, dtype, kv_dtype)
            pool = torch.zeros(1, 6, 2, config.num_kv_heads, shapes.page_size, config.head_dim, dtype=kv_dtype)
            query = torch.zeros(shapes.batch, config.num_heads, config.head_dim, dtype=dtype)
            for form, batch in itertools.product(FORMS, (decoding_batch(shapes, CPU), prompt_batch(shapes, CPU))):
                rows = query[:1].expand(batch.num_tokens, -1, -1).contiguous()
                TritonPrefillAttention(pool).attend(0, rows, batch, form)
    kinds = {80: [torch.int8], 89: [FLOAT8], 90: [torch.int8, FLOAT8]}[capability]
    for (outputs, inputs), kind in itertools.product(WEIGHTS, kinds):
        layer = TritonRoundedLinear(rounded(torch.zeros(outputs, inputs), kind))
        for num_rows in TILES:
            layer(torch.zeros(num_rows, inputs, dtype=torch.bfloat16))


def _types(capability: int, *, is_first: bool) -> list[tuple[torch.dtype, torch.dtype]]:
    """Of queries and of KV. For 8.9, the least that has floats of eight bits, what has to do with these is enough."""
    float8 = [(torch.bfloat16, FLOAT8)] if capability >= 89 and is_first else []
    return float8 if capability == 89 else [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), *float8]


def _compile_only(kernel: JITFunction, grid: tuple[int, ...]) -> Any:
    def compile_it(*arguments: Any, **constants: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **constants)
        assert compiled.asm["cubin"]
        print(compiled.name, arguments[0].dtype, compiled.metadata.shared)

    return compile_it


if __name__ == "__main__":
    main()
