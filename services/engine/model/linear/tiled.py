"""Linear layers on the CPU in products of tiles of float32.

A row's result is bitwise the same whatever rows are beside it, and however many threads compute.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.jobs import Jobs, rows_a_chunk
from services.engine.kernels.team import Team
from services.engine.kernels.writer import LANES
from services.engine.model.linear.tiled_kernels import TILE_PANELS, finish_rows, multiply_floats

# So many chunks a thread that one of them is not waited for long, but not so many that taking them costs.
_CHUNKS_A_THREAD = 4


class Tiled:
    """What layers of tiles share: columns in panels, and their split among threads."""

    def __init__(self, num_columns: int, bias: Tensor | None, team: Team) -> None:
        self._num_columns = num_columns
        self._num_panels = -(-num_columns // LANES)
        self._bias = bias
        self._team = team
        tiles_a_chunk = max(1, self._num_panels // (TILE_PANELS * _CHUNKS_A_THREAD * team.num_threads))
        self._panels_a_chunk = TILE_PANELS * tiles_a_chunk
        self._num_chunks = -(-self._num_panels // self._panels_a_chunk)

    def __call__(self, rows: Tensor) -> Tensor:
        """See Linear."""
        jobs = Jobs(self._team)
        result = self.add_to(jobs, rows.contiguous())
        jobs.run()
        return result

    def add_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """See TeamLinear."""
        raise NotImplementedError

    def _empty(self, jobs: Jobs, num_rows: int) -> Tensor:
        return jobs.take(num_rows, self._num_panels * LANES)

    def _finished(self, jobs: Jobs, out: Tensor) -> Tensor:
        """The columns of `out` without the padding, and the bias added."""
        if self._bias is None and out.shape[1] == self._num_columns:
            return out
        num_rows, size = out.shape[0], rows_a_chunk(out.shape[0], self._num_columns, self._team)
        result = jobs.take(num_rows, self._num_columns)
        bias = 0 if self._bias is None else self._bias
        jobs.add(
            finish_rows, -(-num_rows // size), out, bias, result, num_rows, *out.shape[1:], self._num_columns, size
        )
        return result


class TiledLinear(Tiled):
    """A float32 layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, team: Team) -> None:
        super().__init__(weight.shape[0], bias, team)
        self._depth = weight.shape[1]
        padded = F.pad(weight, (0, 0, 0, self._num_panels * LANES - self._num_columns))
        self._panels = padded.view(self._num_panels, LANES, self._depth).transpose(1, 2).contiguous()

    def add_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """See TeamLinear."""
        out = self._empty(jobs, rows.shape[0])
        shape = (rows.shape[0], self._depth, self._num_panels, self._panels_a_chunk)
        jobs.add(multiply_floats, self._num_chunks, rows, self._panels, out, *shape)
        return self._finished(jobs, out)
