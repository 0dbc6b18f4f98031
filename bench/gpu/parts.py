"""What is measured, part by part; each gives figures by their keys, and the roofline is part of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from bench.gpu.clock import median_s
from bench.gpu.copies import Pools, copy_figures
from bench.gpu.engine import Decoding, Engine, make_pool
from bench.gpu.neighbour import busy_neighbour
from bench.gpu.shapes import Shapes, random_model
from services.engine.attention.factory import make_attention
from services.engine.attention.stored import FLOAT8
from services.engine.batch import ForwardBatch
from services.engine.model.decoder import Decoder
from services.engine.model.linear.form import NEEDED, WeightForm
from services.engine.model.linear.rounded_choice import rounded_maker
from services.rpc.cuda_driver import CudaDriver

Figures = dict[str, float]
NUM_STEPS = 40


@dataclass
class Bench:
    """The device, what it was found to be able to do, and the model, made once."""

    shapes: Shapes
    device: torch.device
    bytes_per_s: float = field(default=float("nan"))  # of a copy, counting what is read and what is written
    flops: float = field(default=float("nan"))  # of a matrix product

    @cached_property
    def model(self) -> Decoder:
        return random_model(self.shapes, self.device)

    def ceilings(self) -> Figures:
        """The rooflines: all other figures are shares of these two."""
        shapes, device = self.shapes, self.device
        source = torch.randint(0, 255, (shapes.copied_bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * shapes.copied_bytes / median_s(lambda: target.copy_(source), device)
        left, right = torch.randn(2, shapes.matrix, shapes.matrix, device=device).to(shapes.dtype)
        self.flops = 2 * shapes.matrix**3 / median_s(lambda: left @ right, device)
        return {"copy_gb_per_s": self.bytes_per_s / 1e9, "matmul_tflops": self.flops / 1e12}

    def one_stream(self) -> Figures:
        """A decoding step of one short sequence, beside reading the weights once."""
        engine = Engine(self.model, self.shapes, 4096, 1)
        decoding = engine.decode(1, 32, NUM_STEPS)
        step_s = statistics.median(decoding.step_s)
        bound_s = self.shapes.weight_bytes / self.bytes_per_s
        return {
            "one_stream_step_ms": step_s * 1e3,
            "one_stream_weights_ms": bound_s * 1e3,
            "one_stream_step_over_weights": step_s / bound_s,
            **_gap("one_stream", decoding),
        }

    def rounded(self) -> Figures:
        """The step of one stream with weights of eight bits, beside reading these once."""
        figures: Figures = {}
        for name, kind in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            if self.device.type == "cuda" and kind != torch.int8 and not has_floats_of_eight_bits(self.device):
                continue
            model = random_model(self.shapes, self.device, rounded_maker(self.device, self.shapes.dtype, kind, name))
            decoding = Engine(model, self.shapes, 4096, 1).decode(1, 32, NUM_STEPS)
            step_s = statistics.median(decoding.step_s)
            bound_s = self.shapes.num_linear_weights / self.bytes_per_s
            figures[f"{name}_one_stream_step_ms"] = step_s * 1e3
            figures[f"{name}_one_stream_step_over_weights"] = step_s / bound_s
        return figures

    def decode_attention(self) -> Figures:
        """Attention alone over the pages of a decoding batch, one layer after the other as in a step."""
        return self._decode_attention_over(self.shapes.dtype, "decode_attention")

    def fp8_kv(self) -> Figures:
        """The same over KV of eight bits, beside reading these once."""
        if self.device.type == "cuda" and not has_floats_of_eight_bits(self.device):
            return {}
        return self._decode_attention_over(FLOAT8, "fp8_kv_decode_attention")

    def _decode_attention_over(self, kv_dtype: torch.dtype, name: str) -> Figures:
        shapes, config = self.shapes, self.shapes.config
        kv = make_pool(shapes, shapes.batch * shapes.context, self.device, kv_dtype)
        attention = make_attention(None, kv, config, dtype=shapes.dtype)
        query = torch.randn(shapes.batch, config.num_heads, config.head_dim, device=self.device).to(shapes.dtype)
        batch = decoding_batch(shapes, self.device)

        def all_layers() -> None:
            for layer in range(config.num_layers):
                attention.attend(layer, query, batch)

        seconds = median_s(all_layers, self.device)
        bytes_per_token = shapes.kv_bytes_per_token * kv_dtype.itemsize // shapes.dtype.itemsize
        bound_s = shapes.batch * shapes.context * bytes_per_token / self.bytes_per_s
        return {
            f"{name}_ms": seconds * 1e3,
            f"{name}_bound_ms": bound_s * 1e3,
            f"{name}_share": bound_s / seconds,
        }

    def prefill(self) -> Figures:
        """One step that computes a prompt."""
        shapes, config, model = self.shapes, self.shapes.config, self.model
        kv = make_pool(shapes, shapes.prompt, self.device)
        attention, batch = make_attention(None, kv, config), prompt_batch(shapes, self.device)
        seconds = median_s(
            lambda: model.logits(model.forward(batch, attention)[-1:]), self.device, repeats=3, warm_ups=1
        )
        seen = shapes.prompt * (shapes.prompt + 1) // 2
        attention_flops = 4 * seen * config.num_heads * config.head_dim * config.num_layers
        flops = 2 * shapes.num_layer_weights * shapes.prompt + attention_flops
        return {
            "prefill_ms": seconds * 1e3,
            "prefill_tokens_per_s": shapes.prompt / seconds,
            "prefill_share": flops / seconds / self.flops,
        }

    def large_batch(self) -> Figures:
        """Decoding steps of many sequences, beside reading weights and KV once."""
        return self._batch_of(self.shapes.large_batch, self.shapes.context // 4, "large_batch")

    def batch(self) -> Figures:
        """The same for a middling batch of long sequences."""
        return self._batch_of(self.shapes.batch, self.shapes.context, "batch")

    def kv_copy(self) -> Figures:
        """Pages from one pool into another on the same GPU: a KV transfer's bytes, each read and written once."""
        shapes = self.shapes
        source, target = (make_pool(shapes, shapes.prompt, self.device) for _ in range(2))
        pages = torch.randperm(source.shape[1], device=self.device)

        def move() -> None:
            for layer in range(source.shape[0]):
                target[layer].index_copy_(0, pages, source[layer])

        seconds = median_s(move, self.device)
        moved = shapes.prompt * shapes.kv_bytes_per_token
        return {"kv_copy_gb_per_s": moved / seconds / 1e9, "kv_copy_share": 2 * moved / seconds / self.bytes_per_s}

    def service_copy(self) -> Figures:
        """The same by the transfer service's own code, where there is a driver to call: with the GPU to itself, and
        beside a process that computes, as beside an engine."""
        if self.device.type != "cuda":
            return {}
        shapes = self.shapes
        source, target = (make_pool(shapes, shapes.prompt, self.device) for _ in range(2))
        torch.cuda.synchronize(self.device)
        layers, pages = source.shape[:2]
        page_bytes = source[0, 0].numel() * source.element_size()
        pools = Pools(source.data_ptr(), target.data_ptr(), layers, pages, page_bytes)
        driver = CudaDriver(self.device.index)
        figures = copy_figures(driver, pools, self.bytes_per_s)
        with busy_neighbour(self.device):
            beside = copy_figures(driver, pools, self.bytes_per_s, repeats=3)
        return figures | {key.replace("kv_copy_", "kv_copy_beside_"): value for key, value in beside.items()}

    def _batch_of(self, num_sequences: int, context: int, name: str) -> Figures:
        shapes = self.shapes
        engine = Engine(self.model, shapes, num_sequences * (context + NUM_STEPS + 64), num_sequences)
        decoding = engine.decode(num_sequences, context, NUM_STEPS)
        step_s = statistics.median(decoding.step_s)
        kv_bytes = num_sequences * decoding.context * shapes.kv_bytes_per_token
        bound_s = (shapes.weight_bytes + kv_bytes) / self.bytes_per_s
        return {
            f"{name}_step_ms": step_s * 1e3,
            f"{name}_bound_ms": bound_s * 1e3,
            f"{name}_share": bound_s / step_s,
            f"{name}_tokens_per_s": num_sequences / step_s,
            **_gap(name, decoding),
        }

    @property
    def parts(self) -> dict[str, Callable[[], Figures]]:
        """In the order in which they are run."""
        return {
            "ceilings": self.ceilings,
            "decode attention": self.decode_attention,
            "one stream": self.one_stream,
            "prefill": self.prefill,
            "KV copy": self.kv_copy,
            "service copy": self.service_copy,
            "batch": self.batch,
            "large batch": self.large_batch,
            "rounded weights": self.rounded,
            "fp8 KV": self.fp8_kv,
        }


def has_floats_of_eight_bits(device: torch.device) -> bool:
    """Whether a GPU multiplies with them."""
    return torch.cuda.get_device_capability(device) >= NEEDED[WeightForm.FLOATS8]


def _gap(name: str, decoding: Decoding) -> Figures:
    """Where there are gaps: on a GPU whose steps are graphs."""
    return {f"{name}_gap_p50_us": statistics.median(decoding.gap_s) * 1e6} if decoding.gap_s else {}


def decoding_batch(shapes: Shapes, device: torch.device) -> ForwardBatch:
    """Every sequence computes its last token; pages are scattered."""
    count, pages = shapes.batch, -(-shapes.context // shapes.page_size)
    order = torch.randperm(count * pages, generator=torch.Generator().manual_seed(0)).int().view(count, pages)
    contexts = torch.full((count,), shapes.context, dtype=torch.int32)
    last = torch.full((count,), shapes.context - 1, device=device)
    slots = order[:, -1].long().to(device) * shapes.page_size + (shapes.context - 1) % shapes.page_size
    return ForwardBatch(
        token_ids=torch.zeros(count, dtype=torch.int64, device=device),
        positions=last,
        slots=slots,
        query_starts=torch.arange(count + 1, dtype=torch.int32),
        context_lengths=contexts,
        block_tables=order.to(device),
        logits_rows=torch.arange(count, device=device),
        contexts=contexts.to(device),
    )


def prompt_batch(shapes: Shapes, device: torch.device) -> ForwardBatch:
    """One whole prompt, pages in a row."""
    count = shapes.prompt
    places = torch.arange(count, device=device)
    return ForwardBatch(
        token_ids=torch.randint(0, shapes.config.vocab_size, (count,), device=device),
        positions=places,
        slots=places,
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lengths=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(-(-count // shapes.page_size), dtype=torch.int32, device=device)[None],
        logits_rows=places[-1:],
    )
