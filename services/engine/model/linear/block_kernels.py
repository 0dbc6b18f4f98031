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

# What fits the registers, 32 of 16 numbers or 16 of 8: two for each element of a tile, three if rows have two bytes.
TILE_PANELS = 3 if HAS_WIDE_VECTORS else 1
_ROWS = {1: 4, 2: 2} if HAS_WIDE_VECTORS else {1: 2, 2: 1}  # by the bytes of their numbers

MakeTile = Callable[[int, int, int], Any]  # of rows, panels and the bytes of a number


def _columns(make_tile: MakeTile, panels: int, number_bytes: int) -> Any:
    """All rows times a tile's columns; see the tile for the arguments."""
    tile_rows = _ROWS[number_bytes]
    tile, one_row = make_tile(tile_rows, panels, number_bytes), make_tile(1, panels, number_bytes)

    @part_of_kernel
    def multiply(
        rows: int,
        scales: int,
        num_rows: int,
        count: int,
        right: int,
        factor: int,
        out: int,
        out_row: int,
    ) -> None:
        width, scales_width = count * GROUP * number_bytes, count * SCALE_BYTES
        row = 0
        while row < num_rows:
            at, its_scales, to = rows + row * width, scales + row * scales_width, out + row * out_row
            if row + tile_rows <= num_rows:
                tile(at, width, its_scales, scales_width, right, count, factor, to, out_row)
                row += tile_rows
            else:
                one_row(at, width, its_scales, scales_width, right, count, factor, to, out_row)
                row += 1

    return multiply


def _chunk(make_tile: MakeTile, block_bytes: int, number_bytes: int) -> Any:
    tile = _columns(make_tile, TILE_PANELS, number_bytes)
    single_panel = _columns(make_tile, 1, number_bytes)

    @part_of_kernel
    def multiply(job: Any, chunk: int) -> None:
        rows, scales, right, out = job[0], job[1], job[2], job[3]
        num_rows, num_groups, num_panels, factor, panels_a_chunk = job[4], job[5], job[6], job[7], job[8]
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


def _quantise(number_bytes: int) -> Any:
    """Rows of float32 to numbers: each GROUP of a row by its own largest magnitude, the last filled up with zeros."""
    quantise = quantise_group(number_bytes)
    group_bytes = GROUP * number_bytes

    @part_of_kernel
    def quantise_rows(job: Any, chunk: int) -> None:
        num_rows, depth, rows_a_chunk = job[3], job[4], job[5]
        num_groups, whole = (depth + GROUP - 1) // GROUP, depth // GROUP
        rest = np.zeros(GROUP, dtype=np.float32)
        for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
            values, quantised = job[0] + row * depth * 4, job[1] + row * num_groups * group_bytes
            scales = job[2] + row * num_groups * SCALE_BYTES
            for group in range(whole):
                quantise(values + group * GROUP * 4, quantised + group * group_bytes, scales + group * SCALE_BYTES)
            if num_groups > whole:
                rest[: depth - whole * GROUP] = floats(values + whole * GROUP * 4, (depth - whole * GROUP,))
                quantise(rest.ctypes.data, quantised + whole * group_bytes, scales + whole * SCALE_BYTES)

    return quantise_rows


_bytes, _bytes_by_2 = (_chunk(byte_tile, BYTE_BLOCK, number_bytes) for number_bytes in (1, 2))
_nibbles, _nibbles_by_2 = (_chunk(nibble_tile, NIBBLE_BLOCK, number_bytes) for number_bytes in (1, 2))
_quantise_to_1, _quantise_to_2 = (_quantise(number_bytes) for number_bytes in (1, 2))


def _multiply_bytes(job: Any, chunk: int) -> None:
    _bytes(job, chunk)


def _multiply_bytes_by_2(job: Any, chunk: int) -> None:
    _bytes_by_2(job, chunk)


def _multiply_nibbles(job: Any, chunk: int) -> None:
    _nibbles(job, chunk)


def _multiply_nibbles_by_2(job: Any, chunk: int) -> None:
    _nibbles_by_2(job, chunk)


def _quantise_rows(job: Any, chunk: int) -> None:
    _quantise_to_1(job, chunk)


def _quantise_rows_to_2(job: Any, chunk: int) -> None:
    _quantise_to_2(job, chunk)


# By the bytes of the numbers that rows are rounded to.
MULTIPLY_BYTES = {1: kernel(_multiply_bytes), 2: kernel(_multiply_bytes_by_2)}
MULTIPLY_NIBBLES = {1: kernel(_multiply_nibbles), 2: kernel(_multiply_nibbles_by_2)}
QUANTISE_ROWS = {1: kernel(_quantise_rows), 2: kernel(_quantise_rows_to_2)}
