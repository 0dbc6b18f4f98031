"""Decoding as CUDA graphs: hundreds of kernels a step started by one call, for batches of a few sizes.

A batch is padded with repetitions of its first row. A repetition computes and stores what that row does, so no page is
set aside for padding and nothing of it is looked at.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.problem import Problem
from services.engine.attention.triton_paged import TritonPagedAttention
from services.engine.batch import ForwardBatch
from services.engine.core.plan import StepPlan
from services.engine.model.model import Model

CAPTURE_S = 20.0  # no further size is captured after so long; larger batches are computed without a graph
CAPTURE_BYTES = 2 << 30  # nor after so much memory
WARM_UPS = 2  # kernels are compiled and libraries set up before a capture, which allows neither
TOLERANCE = 2e-2  # of a graph's logits, of the largest one: half precision rounds otherwise in kernels of other shapes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Memory that graphs read; the batch of a size is the first rows of it."""

    tokens: Tensor  # (most,) int64
    positions: Tensor  # (most,) int64
    slots: Tensor  # (most,) int64
    contexts: Tensor  # (most,) int32
    tables: Tensor  # (most, max_pages) int32


@dataclass(slots=True)
class DecodeGraphs:
    """One graph a size. No shape and no argument of the kernels of `attention` may depend on contexts."""

    model: Model
    attention: AttentionBackend
    sizes: Sequence[int]
    max_pages: int  # of one sequence
    _inputs: _Inputs = field(init=False)
    _graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        most, device = max(self.sizes), self.model.device
        tokens, positions, slots = torch.zeros(3, most, dtype=torch.int64, device=device)
        ones = torch.ones(most, dtype=torch.int32, device=device)
        tables = torch.zeros(most, self.max_pages, dtype=torch.int32, device=device)
        self._inputs = _Inputs(tokens, positions, slots, ones, tables)

    def capture(self) -> None:
        """Captures sizes, smallest first, within bounds; a size that fails is left to be computed without a graph.

        Page 0 of the pool is written: nothing may be in use yet.
        """
        device = self.model.device
        began, free = time.monotonic(), _free_bytes(device)
        stream, caller = torch.cuda.Stream(device), torch.cuda.current_stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(caller)
        pool = torch.cuda.graph_pool_handle()
        # One stream for all: libraries keep tens of MiB for each that they work on. A capture that fails leaves its
        # stream the current one of this thread, which ends here.
        with torch.cuda.stream(stream):
            for size in self.sizes:
                used = free - _free_bytes(device)
                if time.monotonic() - began > CAPTURE_S or used > CAPTURE_BYTES:
                    _log.warning("no time or memory to capture more", extra={"fields": {"from_size": size}})
                    break
                try:
                    self._graphs[size] = self._capture(size, pool, stream)
                except Exception as error:  # whatever a kernel refuses, the engine serves without the graph
                    fields = {"size": size, "why": f"{type(error).__name__}: {error}"}
                    _log.warning("decoding is not captured", extra={"fields": fields})
                    break
        caller.wait_stream(stream)
        used = free - _free_bytes(device)
        fields = {
            "sizes": ",".join(map(str, self._graphs)),
            "seconds": round(time.monotonic() - began, 1),
            "mib": used >> 20,
        }
        _log.info("decoding captured", extra={"fields": fields})

    def bucket(self, plan: StepPlan) -> int:
        """The size that a step is padded to; 0 if it is not to be computed by a graph."""
        segments = plan.segments
        if any(segment.num_tokens != 1 or segment.score is not None for segment in segments):
            return 0
        if max(len(segment.page_ids) for segment in segments) > self.max_pages:
            return 0
        return min((size for size in self._graphs if size >= len(segments)), default=0)

    def replay(self, batch: ForwardBatch) -> Tensor:
        """Logits, (rows, vocab) float32, of a batch padded to a size; the next replay overwrites them."""
        graph, logits = self._graphs[batch.num_tokens]
        self.fill(batch)
        graph.replay()
        return logits

    def fill(self, batch: ForwardBatch) -> None:
        """Copies on the device: the batch came in one copy from the CPU."""
        num_rows, inputs = batch.num_tokens, self._inputs
        assert batch.contexts is not None
        inputs.tokens[:num_rows] = batch.token_ids
        inputs.positions[:num_rows] = batch.positions
        inputs.slots[:num_rows] = batch.slots
        inputs.contexts[:num_rows] = batch.contexts
        inputs.tables[:num_rows, : batch.block_tables.shape[1]] = batch.block_tables

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """On `stream`, which is the current one."""
        batch = self.static_batch(size)
        for _ in range(WARM_UPS):
            expected = self.logits(batch)
        graph = torch.cuda.CUDAGraph()
        # Other threads of an engine (guides, metrics) may call CUDA meanwhile: only this one's calls are captured.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            logits = self.logits(batch)
        graph.replay()
        difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:  # NaN is not
            raise RuntimeError(f"a replay differs by {difference:.2g}")
        return graph, logits

    def static_batch(self, size: int) -> ForwardBatch:
        """The batch of a size over the graphs' memory. What it says on the CPU is not looked at by `attention`."""
        inputs = self._inputs
        return ForwardBatch(
            token_ids=inputs.tokens[:size],
            positions=inputs.positions[:size],
            slots=inputs.slots[:size],
            query_starts=torch.arange(size + 1, dtype=torch.int32),
            context_lengths=torch.ones(size, dtype=torch.int32),
            block_tables=inputs.tables[:size],
            logits_rows=inputs.tokens[:0],
            contexts=inputs.contexts[:size],
        )

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> Tensor:
        """What a graph computes."""
        return self.model.logits(self.model.forward(batch, self.attention))


def decode_graphs(
    model: Model, kv: Tensor, most_rows: int, max_context: int, kind: type[DecodeGraphs] = DecodeGraphs
) -> DecodeGraphs | None:
    """Graphs for batches up to `most_rows`, captured; None, and a line in the log, where there can be none."""
    try:
        attention = triton_paged(kv, model.config.num_heads, model.dtype)
    except Exception as error:  # whatever a compiler says, the engine serves without graphs
        _log.warning("decoding is not captured", extra={"fields": {"why": f"{type(error).__name__}: {error}"}})
        return None
    graphs = kind(model, attention, sizes_to(most_rows), -(-max_context // kv.shape[4]))
    graphs.capture()
    return graphs


def triton_paged(kv: Tensor, num_heads: int, dtype: torch.dtype) -> TritonPagedAttention:
    """Attention that can be captured, held to the oracle first. Raises BackendUnavailable or WrongResult."""
    problem = Problem(kv, num_heads, dtype)
    problem.check(TritonPagedAttention(problem.kv))
    return TritonPagedAttention(kv)


def sizes_to(most: int) -> Sequence[int]:
    """Sizes of batches that are captured, up to `most`: padding stays below eight rows."""
    return [*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most]


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])
