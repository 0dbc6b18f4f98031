"""The products of float32 layers on the CPU, as a kernel of a team: one chunk is some panels of columns for every row.

Every element is computed the same way in every tile, so its bits do not depend on which one it fell into.
"""

from __future__ import annotations

from typing import Any

from services.engine.kernels.machine_code import kernel, part_of_kernel
from services.engine.kernels.memory import floats
from services.engine.kernels.tiles import float_tile
from services.engine.kernels.writer import HAS_WIDE_VECTORS, LANES

# What fits the registers: 32 of 16 floats, or 16 of 8.
TILE_PANELS = 3 if HAS_WIDE_VECTORS else 1
_ROWS = 8 if HAS_WIDE_VECTORS else 4


def _float_columns(panels: int) -> Any:
    """All rows times a tile's columns, in float32; see float_tile for the arguments."""
    tile, one_row = float_tile(_ROWS, panels), float_tile(1, panels)

    @part_of_kernel
    def multiply(rows: int, num_rows: int, depth: int, right: int, out: int, out_row: int) -> None:
        width, panel, step = depth * 4, depth * LANES * 4, LANES * 4
        row = 0
        while row < num_rows:
            at, to = rows + row * width, out + row * out_row
            if row + _ROWS <= num_rows:
                tile(at, width, 4, right, panel, step, depth, to, out_row, 0)
                row += _ROWS
            else:
                one_row(at, width, 4, right, panel, step, depth, to, out_row, 0)
                row += 1

    return multiply


_float_tile, _float_panel = _float_columns(TILE_PANELS), _float_columns(1)


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


multiply_floats = kernel(_multiply_floats)
finish_rows = kernel(_finish_rows)
