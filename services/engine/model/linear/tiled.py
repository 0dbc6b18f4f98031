"""Linear layers on the CPU in products of tiles of float32.

A row's result is bitwise the same whatever rows are beside it, and however many threads compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.jobs import Jobs, rows_a_chunk
from services.engine.kernels.team import Team, addresses
from services.engine.kernels.writer import LANES
from services.engine.model.linear.largest_kernels import choose, multiply_and_find
from services.engine.model.linear.tiled_kernels import TILE_PANELS, finish_rows, multiply_floats

# Chunks a thread: so many that one of them is not waited for long, but not so many that taking them costs. The first
# one is usual, trial.py may find another one faster.
SPLITS = (4, 2, 1)
_FOUND_PANELS = 16 * TILE_PANELS  # of a chunk that is looked through: what 32 rows of it take stays in the second cache


@dataclass(frozen=True, slots=True)
class Product:
    """A job that multiplies, but for how its columns are split: that is the last of its arguments."""

    kernel: int
    out: Tensor  # (num_rows, all panels * LANES), once it has run
    arguments: tuple[Any, ...]


class BatchSize(Enum):
    """What the split of a layer may depend on, its result never."""

    ONE = "one"
    MANY = "many"

    @classmethod
    def of(cls, num_rows: int) -> BatchSize:
        """The size of a batch of so many rows."""
        return cls.ONE if num_rows == 1 else cls.MANY


class Tiled(ABC):
    """What layers of tiles share: columns in panels, and their split among threads."""

    def __init__(self, depth: int, num_columns: int, bias: Tensor | None, team: Team) -> None:
        self.depth = depth
        self.num_columns = num_columns
        self._num_panels = -(-num_columns // LANES)
        self._bias = bias
        self._team = team
        self._panels_a_chunk: dict[BatchSize, int] = {}
        for size in BatchSize:
            self.split(size, SPLITS[0])

    def __call__(self, rows: Tensor) -> Tensor:
        """See Linear."""
        jobs = Jobs(self._team)
        result = self.add_to(jobs, rows.contiguous())
        jobs.run()
        return result

    def split(self, size: BatchSize, chunks_a_thread: int) -> None:
        """From now on such batches are split so."""
        tiles_a_chunk = max(1, self._num_panels // (TILE_PANELS * chunks_a_thread * self._team.num_threads))
        self._panels_a_chunk[size] = TILE_PANELS * tiles_a_chunk

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory of the weight."""

    @abstractmethod
    def prepare(self, jobs: Jobs, rows: Tensor) -> Product:
        """What multiplies rows (num_rows, in), contiguous; what has to come before it is added to the jobs."""

    def add_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """See TeamLinear."""
        product, panels = self.prepare(jobs, rows), self._panels_a_chunk[BatchSize.of(rows.shape[0])]
        jobs.add(product.kernel, self._num_chunks(panels), *product.arguments, panels)
        return self._finished(jobs, product.out)

    def add_largest_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """See TeamLinear."""
        if self._bias is not None:
            raise ValueError("the largest is found before a bias would be added")
        product, num_rows, num_chunks = self.prepare(jobs, rows), rows.shape[0], self._num_chunks(_FOUND_PANELS)
        best, places = jobs.take(num_chunks, num_rows), jobs.take(num_chunks, num_rows, dtype=torch.int64)
        chosen = jobs.take(num_rows, dtype=torch.int64)
        columns = (product.out.shape[1], self.num_columns, _FOUND_PANELS * LANES)
        inner = addresses(*product.arguments, _FOUND_PANELS)
        arguments = (product.kernel, inner, product.out, best, places, num_rows, *columns)
        jobs.add(multiply_and_find, num_chunks, *arguments)
        jobs.keep(product.arguments)
        jobs.add(choose, 1, best, places, chosen, num_chunks, num_rows)
        return chosen

    def _num_chunks(self, panels_a_chunk: int) -> int:
        return -(-self._num_panels // panels_a_chunk)

    def _empty(self, jobs: Jobs, num_rows: int) -> Tensor:
        return jobs.take(num_rows, self._num_panels * LANES)

    def _finished(self, jobs: Jobs, out: Tensor) -> Tensor:
        """The columns of `out` without the padding, and the bias added."""
        if self._bias is None and out.shape[1] == self.num_columns:
            return out
        num_rows, size = out.shape[0], rows_a_chunk(out.shape[0], self.num_columns, self._team)
        result = jobs.take(num_rows, self.num_columns)
        bias = 0 if self._bias is None else self._bias
        jobs.add(finish_rows, -(-num_rows // size), out, bias, result, num_rows, *out.shape[1:], self.num_columns, size)
        return result


class TiledLinear(Tiled):
    """A float32 layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, team: Team) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias, team)
        padded = F.pad(weight, (0, 0, 0, self._num_panels * LANES - self.num_columns))
        self._panels = padded.view(self._num_panels, LANES, self.depth).transpose(1, 2).contiguous()

    @property
    def num_bytes(self) -> int:
        """See Tiled."""
        return self._panels.nbytes

    def prepare(self, jobs: Jobs, rows: Tensor) -> Product:
        """See Tiled."""
        out = self._empty(jobs, rows.shape[0])
        shape = (rows.shape[0], self.depth, self._num_panels)
        return Product(multiply_floats, out, (rows, self._panels, out, *shape))
