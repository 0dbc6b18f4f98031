"""The products of linear layers on the CPU, as kernels of a team: one chunk is some panels of columns for every row.

Every element is computed the same way in every tile, so its bits do not depend on which one it fell into.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.engine.kernels.machine_code import kernel, part_of_kernel
from services.engine.kernels.memory import floats
from services.engine.kernels.tiles import GROUP, HAS_WIDE_VECTORS, LANES, byte_tile, float_tile, quantise_group

# What fits the registers: 32 of 16 floats, or 16 of 8. A tile of bytes needs two for each of its elements.
TILE_PANELS = 3 if HAS_WIDE_VECTORS else 1
_BYTE_ROWS, _FLOAT_ROWS = (4, 8) if HAS_WIDE_VECTORS else (2, 4)


def _byte_columns(panels: int) -> Any:
    """All rows times a tile's columns, in bytes; see byte_tile for the arguments."""
    tile, one_row = byte_tile(_BYTE_ROWS, panels), byte_tile(1, panels)

    @part_of_kernel
    def multiply(
        rows: int, scales: int, num_rows: int, count: int, right: int, right_scales: int, out: int, out_row: int
    ) -> None:
        width, scales_width = count * GROUP, count * 8
        panel, scales_panel = width * LANES, count * LANES * 4
        row = 0
        while row < num_rows:
            at, its_scales, to = rows + row * width, scales + row * scales_width, out + row * out_row
            if row + _BYTE_ROWS <= num_rows:
                tile(at, width, its_scales, scales_width, right, panel, right_scales, scales_panel, count, to, out_row)
                row += _BYTE_ROWS
            else:
                one_row(
                    at, width, its_scales, scales_width, right, panel, right_scales, scales_panel, count, to, out_row
                )
                row += 1

    return multiply


def _float_columns(panels: int) -> Any:
    """All rows times a tile's columns, in float32; see float_tile for the arguments."""
    tile, one_row = float_tile(_FLOAT_ROWS, panels), float_tile(1, panels)

    @part_of_kernel
    def multiply(rows: int, num_rows: int, depth: int, right: int, out: int, out_row: int) -> None:
        width, panel, step = depth * 4, depth * LANES * 4, LANES * 4
        row = 0
        while row < num_rows:
            at, to = rows + row * width, out + row * out_row
            if row + _FLOAT_ROWS <= num_rows:
                tile(at, width, 4, right, panel, step, depth, to, out_row, 0)
                row += _FLOAT_ROWS
            else:
                one_row(at, width, 4, right, panel, step, depth, to, out_row, 0)
                row += 1

    return multiply


_byte_tile, _byte_panel = _byte_columns(TILE_PANELS), _byte_columns(1)
_float_tile, _float_panel = _float_columns(TILE_PANELS), _float_columns(1)


def _multiply_bytes(job: Any, chunk: int) -> None:
    rows, scales, right, right_scales, out = job[0], job[1], job[2], job[3], job[4]
    num_rows, num_groups, num_panels, panels_a_chunk = job[5], job[6], job[7], job[8]
    panel_bytes, scales_bytes, out_row = num_groups * GROUP * LANES, num_groups * LANES * 4, num_panels * LANES * 4
    panel, last = chunk * panels_a_chunk, min((chunk + 1) * panels_a_chunk, num_panels)
    while panel < last:
        at, at_scales, to = right + panel * panel_bytes, right_scales + panel * scales_bytes, out + panel * LANES * 4
        if panel + TILE_PANELS <= last:
            _byte_tile(rows, scales, num_rows, num_groups, at, at_scales, to, out_row)
            panel += TILE_PANELS
        else:
            _byte_panel(rows, scales, num_rows, num_groups, at, at_scales, to, out_row)
            panel += 1


def _multiply_floats(job: Any, chunk: int) -> None:
    rows, right, out = job[0], job[1], job[2]
    num_rows, depth, num_panels, panels_a_chunk = job[3], job[4], job[5], job[6]
    panel_bytes, out_row = depth * LANES * 4, num_panels * LANES * 4
    panel, last = chunk * panels_a_chunk, min((chunk + 1) * panels_a_chunk, num_panels)
    while panel < last:
        at, to = right + panel * panel_bytes, out + panel * LANES * 4
        if panel + TILE_PANELS <= last:
            _float_tile(rows, num_rows, depth, at, to, out_row)
            panel += TILE_PANELS
        else:
            _float_panel(rows, num_rows, depth, at, to, out_row)
            panel += 1


def _quantise_rows(job: Any, chunk: int) -> None:
    """Rows of float32 to bytes: each GROUP of a row by its own largest magnitude. The last is filled up with zeros."""
    num_rows, depth, rows_a_chunk = job[3], job[4], job[5]
    num_groups, whole = (depth + GROUP - 1) // GROUP, depth // GROUP
    rest = np.zeros(GROUP, dtype=np.float32)
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        values, quantised = job[0] + row * depth * 4, job[1] + row * num_groups * GROUP
        scales = job[2] + row * num_groups * 8
        for group in range(whole):
            quantise_group(values + group * GROUP * 4, quantised + group * GROUP, scales + group * 8)
        if num_groups > whole:
            rest[: depth - whole * GROUP] = floats(values + whole * GROUP * 4, (depth - whole * GROUP,))
            quantise_group(rest.ctypes.data, quantised + whole * GROUP, scales + whole * 8)


def _finish_rows(job: Any, chunk: int) -> None:
    """The first columns of rows that were padded, plus a bias, if there is one."""
    num_rows, padded, num_columns, rows_a_chunk = job[3], job[4], job[5], job[6]
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        values, result = (
            floats(job[0] + row * padded * 4, (num_columns,)),
            floats(job[2] + row * num_columns * 4, (num_columns,)),
        )
        if job[1] == 0:
            result[:] = values
        else:
            result[:] = values + floats(job[1], (num_columns,))


multiply_bytes = kernel(_multiply_bytes)
multiply_floats = kernel(_multiply_floats)
quantise_rows = kernel(_quantise_rows)
finish_rows = kernel(_finish_rows)
