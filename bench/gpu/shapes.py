"""A model of given shapes with random weights, made where it computes: no files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.engine.model.config import ModelConfig, parse_config
from services.engine.model.decoder import Decoder, DecoderWeights, LayerWeights
from services.engine.model.linear.linear import DENSE, Linear, LinearMaker

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "eos_token_id": 128001,
}  # fmt: skip
TINY = LLAMA_8B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": 2,
}  # fmt: skip

_NO_FILE = Path("random weights")


@dataclass(frozen=True, slots=True)
class Shapes:
    """What is measured: a model, and the loads that fit it."""

    config: ModelConfig
    dtype: torch.dtype
    page_size: int
    batch: int  # sequences that decode together
    context: int  # tokens of each
    large_batch: int
    prompt: int  # tokens of a prefill step
    matrix: int  # rows and columns of the product that shows the peak
    copied_bytes: int  # of the copy that shows the bandwidth

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize

    @property
    def num_linear_weights(self) -> int:
        """Weights that each token is multiplied by, the head's included."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        layer = config.hidden_size * (heads + 3 * config.intermediate_size)
        return config.num_layers * layer + config.vocab_size * config.hidden_size

    @property
    def num_layer_weights(self) -> int:
        """The same without the head, which only the last row of a prompt is multiplied by."""
        return self.num_linear_weights - self.config.vocab_size * self.config.hidden_size

    @property
    def weight_bytes(self) -> int:
        """What a decoding step must read of the weights."""
        return self.num_linear_weights * self.dtype.itemsize


def full() -> Shapes:
    """Llama-3.1-8B in bfloat16."""
    return Shapes(parse_config(LLAMA_8B, {}, _NO_FILE), torch.bfloat16, 16, 32, 4096, 128, 8192, 8192, 4 << 30)


def tiny() -> Shapes:
    """The same program in a second on a CPU, to test it: its figures mean nothing."""
    return Shapes(parse_config(TINY, {}, _NO_FILE), torch.float32, 16, 2, 40, 4, 48, 64, 1 << 16)


def random_model(shapes: Shapes, device: torch.device, maker: LinearMaker = DENSE) -> Decoder:
    """A decoder whose weights are normal, small enough that no layer overflows."""
    config = shapes.config

    def weight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=shapes.dtype, device=device).normal_(std=0.02)

    def linear(rows: int, columns: int) -> Linear:
        return maker.make(weight(rows, columns), None)

    def norm() -> Tensor:
        return torch.ones(config.hidden_size, dtype=torch.float32, device=device)

    def layer() -> LayerWeights:
        hidden, queries = config.hidden_size, config.num_heads * config.head_dim
        heads = queries + 2 * config.num_kv_heads * config.head_dim
        return LayerWeights(
            input_norm=norm(),
            query_key_value=linear(heads, hidden),
            query_key_norm=None,
            output=linear(hidden, queries),
            attention_norm=None,
            mlp_norm=norm(),
            gate_up=linear(2 * config.intermediate_size, hidden),
            down=linear(hidden, config.intermediate_size),
            down_norm=None,
        )

    layers = tuple(layer() for _ in range(config.num_layers))
    embedding = weight(config.vocab_size, config.hidden_size)
    head = linear(config.vocab_size, config.hidden_size)
    return Decoder(config, DecoderWeights(embedding, layers, norm(), head))
