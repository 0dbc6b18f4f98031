"""Attention on the CPU in float32: pages are read where they lie, several sequences at once on all threads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.attention.backend import BackendUnavailable
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.paged_kernels import BLOCK_LANES, attend_block, attend_row, write
from services.engine.batch import ForwardBatch
from services.engine.kernels.facts import BLOCKS, MAX_PAGES, SINGLES, TABLES
from services.engine.kernels.functions import LOG2_E
from services.engine.kernels.jobs import Jobs
from services.engine.kernels.team import address, addresses, team_of
from services.engine.kernels.writer import LANES

MAX_SINGLE_ROWS = 8  # a sequence with more rows in a step has them computed in blocks; where the batch does not say
TOKENS_A_WRITE = 64  # by one thread


_NO_SINGLES = np.zeros(1, dtype=np.int32)  # of every sequence
_NO_BLOCKS = np.empty((0, 4), dtype=np.int32)
_NO_WINDOW = 1 << 40


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows of a batch as the kernels take them; the same for all layers."""

    batch: ForwardBatch
    singles: NDArray[np.int32]  # (n, 3): packed row, sequence, tokens that it sees
    blocks: NDArray[np.int32]  # (n, 4): first packed row, sequence, tokens that it sees, rows
    tables: NDArray[np.int32]  # (num_sequences, max_pages)

    @property
    def is_decoding(self) -> bool:
        """Whether no row is part of a block: then the jobs are the same for every batch of as many tokens."""
        return not len(self.blocks)

    def put(self, facts: NDArray[np.int64]) -> None:
        """Where the kernels find them; they must stay until the jobs have run."""
        facts[SINGLES], facts[BLOCKS] = address(self.singles), address(self.blocks)
        facts[TABLES], facts[MAX_PAGES] = address(self.tables), self.tables.shape[1]


class PagedNumbaAttention(GatherSdpaAttention):
    """Which kernel a row goes to depends on its own sequence only, so other sequences never change its result.

    Output and the last token of a prompt are computed one by one whether they come alone, as they do at first, or with
    what is before them: after an interruption or without a cached prefix. What is before them goes in blocks, however
    little of it a step has: how it is cut depends on what is cached. The two kernels differ in the last bits.

    Heads whose size is no multiple of 16 are left to torch.
    """

    def __init__(self, kv: Tensor, num_threads: int = 1, max_single_rows: int = MAX_SINGLE_ROWS) -> None:
        if kv.device.type != "cpu" or kv.dtype != torch.float32:
            raise BackendUnavailable(f"paged_numba computes float32 on the CPU, not {kv.dtype} on {kv.device}")
        super().__init__(kv)
        self._team = team_of(num_threads)
        self._max_single_rows = max_single_rows
        # Of a pool shared by several ranks this one has some heads of each page: its strides are the whole's.
        self.fits = self.head_dim % LANES == 0 and kv[0].is_contiguous()
        self._rows: PackedRows | None = None

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores key and value, each (num_tokens, num_kv_heads, head_dim), at slots (num_tokens,) int64."""
        if not self.fits or any(part.stride()[1:] != (self.head_dim, 1) for part in (key, value)):
            super().write(layer, key, value, slots)
            return
        num_tokens, kv_heads, head_dim = key.shape
        strides = (4 * key.stride(0), 4 * value.stride(0))
        shape = (num_tokens, TOKENS_A_WRITE, kv_heads, self.page_size, head_dim)
        job = addresses(key, value, *strides, self.kv[layer], slots.contiguous(), *shape)
        self._team.run(write, job, -(-num_tokens // TOKENS_A_WRITE))

    def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
        """Causal attention of query (num_tokens, num_heads, head_dim); the same shape."""
        if not self.fits:
            return super().attend(layer, query, batch, form)
        jobs = Jobs(self._team)
        mixed = self.add_to(jobs, layer, query.contiguous(), batch, form)
        self.rows_of(batch, query.shape[1]).put(jobs.facts)
        jobs.run()
        return mixed

    def add_to(self, jobs: Jobs, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm) -> Tensor:
        """Adds what computes attend() for a contiguous query and a batch whose rows are in the facts of the jobs."""
        rows, pool = self.rows_of(batch, query.shape[1]), self.kv[layer]
        cap, kv_heads = form.softcap or 0.0, self.kv.shape[3]
        scale = form.scale_for(self.head_dim) * (1 / cap if cap else LOG2_E)
        mixed = jobs.take(*query.shape)
        shape = (kv_heads, self.page_size, self.head_dim, query.shape[1] // kv_heads, form.window or _NO_WINDOW)
        numbers = (int(bits) for bits in np.array([scale, cap], dtype=np.float32).view(np.int32))
        arguments = (mixed, query, pool, jobs.facts, *shape, *numbers)
        for kernel, parts in ((attend_row, rows.singles), (attend_block, rows.blocks)):
            if len(parts):
                jobs.add(kernel, len(parts) * kv_heads, *arguments)
        return mixed

    def rows_of(self, batch: ForwardBatch, num_heads: int) -> PackedRows:
        """The rows of a batch, worked out once."""
        if self._rows is None or self._rows.batch is not batch:
            self._rows = self._split_batch(batch, num_heads // self.kv.shape[3])
        return self._rows

    def _split_batch(self, batch: ForwardBatch, group: int) -> PackedRows:
        starts, contexts = batch.query_starts.numpy(), batch.context_lengths.numpy()
        tables = np.ascontiguousarray(batch.block_tables.numpy())
        single_counts, max_single_rows = _NO_SINGLES, self._max_single_rows
        if batch.single_rows is not None:
            single_counts, max_single_rows = batch.single_rows.numpy(), 0
        if batch.num_tokens == batch.num_sequences and (max_single_rows or single_counts.all()):
            singles = np.empty((len(contexts), 3), dtype=np.int32)
            singles[:, :2] = np.arange(len(contexts))[:, None]
            singles[:, 2] = contexts
            return PackedRows(batch, singles, _NO_BLOCKS, tables)
        counts = np.diff(starts)
        other_counts = np.maximum(counts - single_counts, 0)
        is_in_blocks = (other_counts > max_single_rows) & (group <= BLOCK_LANES)  # a block holds whole rows
        block_ends = starts[:-1] + np.where(is_in_blocks, other_counts, 0)
        rows = np.arange(starts[-1], dtype=np.int32)
        sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        seen = contexts[sequences] - (starts[sequences + 1] - rows) + 1
        every = np.stack((rows, sequences, seen), axis=1).astype(np.int32)
        rows_a_block = BLOCK_LANES // min(group, BLOCK_LANES)
        # Blocks begin at multiples of their size in the sequence's own rows, whatever lies before it in the batch.
        is_single = rows >= block_ends[sequences]
        begins = ~is_single & ((rows - starts[sequences]) % rows_a_block == 0)
        lengths = np.minimum(block_ends[sequences] - rows, rows_a_block)
        blocks = np.concatenate((every, lengths[:, None].astype(np.int32)), axis=1)[begins]
        return PackedRows(batch, every[is_single], np.ascontiguousarray(blocks), tables)
