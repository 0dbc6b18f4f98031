"""Linear layers on the CPU whose weights are kept in blocks, of bytes or nibbles, and whose input is rounded.

A row's result is bitwise the same whatever rows are beside it, and however many threads compute. Rows have a scale for
each 32 of their elements: with one scale a row, the few large activations of a row take the resolution from all others.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.kernels.block_tiles import BYTE_BLOCK, GROUP, NIBBLE_BLOCK, SCALE_BYTES
from services.engine.kernels.jobs import Jobs, rows_a_chunk
from services.engine.kernels.team import Team
from services.engine.kernels.writer import LANES
from services.engine.model.linear.block_kernels import MULTIPLY_BYTES, MULTIPLY_NIBBLES, QUANTISE_ROWS, TILE_PANELS
from services.engine.model.linear.blocks import Blocks
from services.engine.model.linear.tiled import Product, Tiled


class BlockLinear(Tiled):
    """A layer of `blocks`; in and out are float32. Elements of a row are rounded to `activation_bytes`, 1 or 2."""

    def __init__(self, blocks: Blocks, bias: Tensor | None, team: Team, activation_bytes: int) -> None:
        super().__init__(blocks.depth, blocks.num_columns, bias, team)
        self._activation_bytes = activation_bytes
        self._num_groups = blocks.num_groups
        self._kernel = (MULTIPLY_BYTES if blocks.minimums is None else MULTIPLY_NIBBLES)[activation_bytes]
        self._tiles = _in_tiles(blocks, self._num_panels)
        self._factor = int(np.float32(blocks.factor).view(np.int32))

    @property
    def num_bytes(self) -> int:
        """See Tiled."""
        return self._tiles.nbytes

    def prepare(self, jobs: Jobs, rows: Tensor) -> Product:
        """See Tiled."""
        num_rows = rows.shape[0]
        quantised = jobs.take(num_rows, self._num_groups * GROUP * self._activation_bytes, dtype=torch.int8)
        scales = jobs.take(num_rows, self._num_groups * SCALE_BYTES, dtype=torch.uint8)
        size = rows_a_chunk(num_rows, self.depth, self._team)
        quantise = QUANTISE_ROWS[self._activation_bytes]
        jobs.add(quantise, -(-num_rows // size), rows, quantised, scales, num_rows, self.depth, size)
        out = self._empty(jobs, num_rows)
        shape = (num_rows, self._num_groups, self._num_panels, self._factor)
        return Product(self._kernel, out, (quantised, scales, self._tiles, out, *shape))


def _in_tiles(blocks: Blocks, num_panels: int) -> Tensor:
    """The memory that kernels read, see block_tiles: tiles of TILE_PANELS panels, then single panels."""
    missing, num_groups = num_panels * LANES - blocks.num_columns, blocks.num_groups
    numbers = blocks.numbers if blocks.minimums is not None else blocks.numbers.view(torch.uint8) ^ 128
    lanes = F.pad(numbers, (0, 0, 0, 0, 0, missing)).contiguous().view(torch.int32)  # of four bytes of k each
    panels = [lanes.view(num_panels, LANES, num_groups, -1).permute(0, 2, 3, 1)]
    for halves in (blocks.scales, blocks.minimums):
        if halves is not None:
            padded = F.pad(halves, (0, 0, 0, missing)).view(num_panels, LANES, num_groups).transpose(1, 2)
            panels.append(padded.flatten().view(torch.int32).view(num_panels, num_groups, 1, -1))
    words = (BYTE_BLOCK if blocks.minimums is None else NIBBLE_BLOCK) // 4
    tiles = torch.empty(num_panels * num_groups * words, dtype=torch.int32)
    whole = num_panels - num_panels % TILE_PANELS
    for begin, end, width in ((0, whole, TILE_PANELS), (whole, num_panels, 1)):
        target = tiles[begin * num_groups * words : end * num_groups * words]
        target = target.view(-1, num_groups, width, words).transpose(1, 2)  # (tiles, panels, groups, words)
        start = 0
        for part in panels:
            of_tiles = part[begin:end].flatten(2).view(-1, width, num_groups, part[0, 0].numel())
            target[..., start : start + of_tiles.shape[-1]] = of_tiles
            start += of_tiles.shape[-1]
    return tiles
