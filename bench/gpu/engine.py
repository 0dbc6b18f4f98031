"""An engine's core without its gRPC side, driven from here: real scheduling, real steps, random weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.gpu.clock import finish
from bench.gpu.gaps import MarkedGraphs, MarkedRunner, Marks
from bench.gpu.shapes import Shapes
from services.engine.attention.factory import make_attention
from services.engine.core import api
from services.engine.core.config import CoreConfig
from services.engine.core.core import EngineCore
from services.engine.gpu.graphs import decode_graphs
from services.engine.model.decoder import Decoder
from services.engine.sampling.params import SamplingParams
from services.protocol.layout import Dtype, PageLayout

MAX_SECONDS = 60.0  # for one load


@dataclass(slots=True)
class Listener:
    """Counts what comes out."""

    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)

    def on_outputs(self, outputs: Sequence[api.SequenceOutput]) -> None:
        self.num_tokens += sum(len(output.token_ids) for output in outputs)
        self.errors += [str(output.error) for output in outputs if output.error is not None]

    def on_load(self, load: api.Load) -> None:
        """Not looked at."""

    def on_fatal(self, error: BaseException) -> None:
        raise error


@dataclass(frozen=True, slots=True)
class Decoding:
    """A load of equal sequences that all decode together."""

    step_s: list[float]  # of the steps in which every sequence got a token
    gap_s: Sequence[float]  # between steps, on the device; none on a CPU
    context: float  # tokens of a sequence in the middle of these steps


class Engine:
    """A core over a pool that holds `num_tokens` of KV."""

    def __init__(self, model: Decoder, shapes: Shapes, num_tokens: int, max_batch_size: int) -> None:
        config, device = shapes.config, model.device
        self.kv = make_pool(shapes, num_tokens, device)
        self.attention = make_attention(None, self.kv, config)
        self._marks, graphs = Marks(), None
        if device.type == "cuda":
            graphs = decode_graphs(model, self.kv, max_batch_size, config.max_context, MarkedGraphs)
        if isinstance(graphs, MarkedGraphs):
            graphs.marks = self._marks
        self.runner = MarkedRunner(model, self.attention, self.kv, (), graphs)
        self.runner.marks = self._marks
        layout = PageLayout(
            config.num_layers, config.num_kv_heads, config.head_dim, shapes.page_size, Dtype[dtype_name(shapes).upper()]
        )
        core_config = CoreConfig(
            b"", layout, self.kv.shape[1], config.vocab_size, config.max_context, max_batch_size=max_batch_size,
            max_step_tokens=shapes.prompt, max_waiting=max_batch_size,
        )  # fmt: skip
        self.listener = Listener()
        self.core = EngineCore(core_config, self.runner, self.listener)
        self._names = iter(range(1 << 30))

    def decode(self, num_sequences: int, context: int, num_steps: int) -> Decoding:
        """Fills `num_sequences` contexts, then times `num_steps` steps in which all of them get a token."""
        commands: list[api.Command] = []
        for _ in range(num_sequences):
            number = next(self._names)
            prompt = tuple((number * 31 + 7 * n) % 500 for n in range(context))
            sampling = SamplingParams(max_tokens=num_steps + 40, ignore_eos=True)
            key = api.RequestKey("bench", str(number))
            commands.append(api.StartGenerate(key, prompt, 0, 0, sampling, None, "", None, call_id=number))
        self._marks.clear()
        seconds: list[float] = []
        until = time.monotonic() + MAX_SECONDS
        is_busy = self.core.step(commands)
        while is_busy and len(seconds) < num_steps and time.monotonic() < until:
            before, began = self.listener.num_tokens, time.perf_counter()
            is_busy = self.core.step()
            if self.listener.num_tokens - before == num_sequences:
                seconds.append(time.perf_counter() - began)
        while self.core.step(
            [api.Cancel(command.key) for command in commands if isinstance(command, api.StartGenerate)]
        ):
            pass
        if self.listener.errors or not seconds:
            raise RuntimeError(f"the engine answered {self.listener.errors[:1] or 'nothing in time'}")
        finish(self.kv.device)
        return Decoding(seconds, self._marks.gaps_s(), context + num_steps / 2)


def make_pool(shapes: Shapes, num_tokens: int, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """KV that holds so many tokens, of random values: zeros are faster than data. `dtype`: None is the model's."""
    config, pages = shapes.config, -(-num_tokens // shapes.page_size)
    size = pages, 2, config.num_kv_heads, shapes.page_size, config.head_dim
    kv = torch.empty(config.num_layers, *size, dtype=dtype or shapes.dtype, device=device)
    for layer in kv:
        layer.copy_(torch.randn(size, dtype=shapes.dtype, device=device))
    return kv


def dtype_name(shapes: Shapes) -> str:
    """As --dtype has it."""
    return str(shapes.dtype).removeprefix("torch.")
