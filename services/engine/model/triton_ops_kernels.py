"""What a decoder computes between its linear layers, on a GPU, in Triton: each operation reads and writes once.

All is computed in float32 and rounded when it is stored. Grids follow from shapes alone, so that a captured graph
computes any step, and a row of a result follows from the same row of the arguments alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)


@triton.jit
def as_kept(values, target):
    """float32 `values` as what `target` points to keeps them: see attention/stored.py."""
    if target.dtype.element_ty == tl.float8e4nv:
        values = tl.where(values > 448.0, 448.0, tl.where(values < -448.0, -448.0, values))
    return values.to(target.dtype.element_ty)


@triton.jit
def add_norm(
    hidden, added, weight, normed,
    epsilon,
    hidden_row, hidden_element, added_row, added_element, normed_row,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDED: tl.constexpr,
):  # fmt: skip
    """One program: one row. hidden += added, if there is one, as hidden's type has it; normed is the norm of that."""
    row, element = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = element < SIZE
    place = hidden + row * hidden_row + element * hidden_element
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        more = tl.load(added + row * added_row + element * added_element, mask=inside, other=0.0).to(tl.float32)
        stored = (values + more).to(hidden.dtype.element_ty)
        tl.store(place, stored, mask=inside)
        values = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + epsilon)
    result = values * scale * tl.load(weight + element, mask=inside, other=0.0)
    tl.store(normed + row * normed_row + element, result.to(normed.dtype.element_ty), mask=inside)


# Positions and slots begin anywhere in a step's one copy: no kernel more for each place.
@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def rotate_and_store(
    projected, query, pool, norm, cosine, sine, positions, slots,
    epsilon, page_size,
    projected_row, projected_element, table_row, pool_page, pool_side, pool_head, pool_slot, pool_element,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """One program: HEADS of the heads of one row, each as its two halves, which rotate into one another.

    Queries go to `query`, (rows, NUM_HEADS, 2 * HALF) without gaps; keys and values to the row's slot of the pool.
    """
    row, element = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    in_half = element < HALF
    is_query, is_rotated = head < NUM_HEADS, head < NUM_HEADS + NUM_KV_HEADS
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    source = projected + row * projected_row
    elements = head[:, None] * (2 * HALF) + element[None, :]
    first = tl.load(source + elements * projected_element, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + (elements + HALF) * projected_element, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        normed = is_rotated[:, None] & in_half[None, :]
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + epsilon)[:, None]
        first *= tl.where(normed, scale * tl.load(norm + elements, mask=normed, other=0.0), 1.0)
        second *= tl.where(normed, scale * tl.load(norm + elements + HALF, mask=normed, other=0.0), 1.0)
    angle = tl.load(positions + row) * table_row + element  # both halves of the table are the same
    turn = is_rotated[:, None]
    cosines = tl.where(turn, tl.load(cosine + angle, mask=in_half, other=0.0)[None, :], 1.0)
    sines = tl.where(turn, tl.load(sine + angle, mask=in_half, other=0.0)[None, :], 0.0)
    lower = first * cosines - second * sines
    upper = second * cosines + first * sines

    place = query + row * (NUM_HEADS * 2 * HALF) + elements
    asked = is_query[:, None] & in_half[None, :]
    tl.store(place, lower.to(query.dtype.element_ty), mask=asked)
    tl.store(place + HALF, upper.to(query.dtype.element_ty), mask=asked)

    slot = tl.load(slots + row)
    kept = head - NUM_HEADS  # keys, then values
    side = kept // NUM_KV_HEADS
    target = slot // page_size * pool_page + slot % page_size * pool_slot
    target = target + side.to(tl.int64) * pool_side + (kept - side * NUM_KV_HEADS) * pool_head
    place = pool + target[:, None] + element[None, :] * pool_element
    stored = inside & (kept >= 0)[:, None]
    tl.store(place, as_kept(lower, pool), mask=stored)
    tl.store(place + HALF * pool_element, as_kept(upper, pool), mask=stored)


@triton.jit
def activate(
    gate_up, result,
    row_stride, element_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements of one row. gate_up (rows, 2 * SIZE), result (rows, SIZE) without gaps."""
    row, element = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    place = gate_up + row * row_stride + element * element_stride
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + SIZE * element_stride, mask=inside, other=0.0).to(tl.float32)
    if KIND == SILU:
        share = tl.sigmoid(gate)
    elif KIND == GELU_TANH:
        # (1 + tanh(x)) / 2 is the sigmoid of 2 x; 1.5957... is 2 * sqrt(2 / pi).
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(result + row * SIZE + element, (gate * share * up).to(result.dtype.element_ty), mask=inside)
