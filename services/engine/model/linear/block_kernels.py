"""The products of layers kept in blocks, as kernels of a team: one chunk is some panels of columns for every row.

Every element is computed the same way in every tile, so its bits do not depend on which one it fell into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from services.engine.kernels.block_tiles import (
    BYTE_BLOCK,
    GROUP,
    NIBBLE_BLOCK,
    SCALE_BYTES,
    byte_tile,
    nibble_tile,
    quantise_group,
)
from services.engine.kernels.machine_code import kernel, part_of_kernel
from services.engine.kernels.memory import floats
from services.engine.kernels.writer import HAS_WIDE_VECTORS, LANES

# What fits the registers, 32 of 16 numbers or 16 of 8: two for each element of a tile.
TILE_PANELS = 3 if HAS_WIDE_VECTORS else 1
_ROWS = 4 if HAS_WIDE_VECTORS else 2


def _columns(make_tile: Callable[[int, int], Any], panels: int) -> Any:
    """All rows times a tile's columns; see the tile for the arguments."""
    tile, one_row = make_tile(_ROWS, panels), make_tile(1, panels)

    @part_of_kernel
    def multiply(
        rows: int, scales: int, num_rows: int, count: int, right: int, factor: int, out: int, out_row: int
    ) -> None:
        width, scales_width = count * GROUP, count * SCALE_BYTES
        row = 0
        while row < num_rows:
            at, its_scales, to = rows + row * width, scales + row * scales_width, out + row * out_row
            if row + _ROWS <= num_rows:
                tile(at, width, its_scales, scales_width, right, count, factor, to, out_row)
                row += _ROWS
            else:
                one_row(at, width, its_scales, scales_width, right, count, factor, to, out_row)
                row += 1

    return multiply


def _chunk(make_tile: Callable[[int, int], Any], block_bytes: int) -> Any:
    tile, single_panel = _columns(make_tile, TILE_PANELS), _columns(make_tile, 1)

    @part_of_kernel
    def multiply(job: Any, chunk: int) -> None:
        rows, scales, right, out = job[0], job[1], job[2], job[3]
        num_rows, num_groups, num_panels, panels_a_chunk, factor = job[4], job[5], job[6], job[7], job[8]
        out_row = num_panels * LANES * 4
        panel, last = chunk * panels_a_chunk, min((chunk + 1) * panels_a_chunk, num_panels)
        while panel < last:
            at, to = right + panel * num_groups * block_bytes, out + panel * LANES * 4
            if panel + TILE_PANELS <= last:
                tile(rows, scales, num_rows, num_groups, at, factor, to, out_row)
                panel += TILE_PANELS
            else:
                single_panel(rows, scales, num_rows, num_groups, at, factor, to, out_row)
                panel += 1

    return multiply


_bytes, _nibbles = _chunk(byte_tile, BYTE_BLOCK), _chunk(nibble_tile, NIBBLE_BLOCK)


def _multiply_bytes(job: Any, chunk: int) -> None:
    _bytes(job, chunk)


def _multiply_nibbles(job: Any, chunk: int) -> None:
    _nibbles(job, chunk)


def _quantise_rows(job: Any, chunk: int) -> None:
    """Rows of float32 to bytes: each GROUP of a row by its own largest magnitude. The last is filled up with zeros."""
    num_rows, depth, rows_a_chunk = job[3], job[4], job[5]
    num_groups, whole = (depth + GROUP - 1) // GROUP, depth // GROUP
    rest = np.zeros(GROUP, dtype=np.float32)
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        values, quantised = job[0] + row * depth * 4, job[1] + row * num_groups * GROUP
        scales = job[2] + row * num_groups * SCALE_BYTES
        for group in range(whole):
            quantise_group(values + group * GROUP * 4, quantised + group * GROUP, scales + group * SCALE_BYTES)
        if num_groups > whole:
            rest[: depth - whole * GROUP] = floats(values + whole * GROUP * 4, (depth - whole * GROUP,))
            quantise_group(rest.ctypes.data, quantised + whole * GROUP, scales + whole * SCALE_BYTES)


multiply_bytes = kernel(_multiply_bytes)
multiply_nibbles = kernel(_multiply_nibbles)
quantise_rows = kernel(_quantise_rows)
