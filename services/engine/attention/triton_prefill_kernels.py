"""Attention of many rows of a sequence over pages of any size on a GPU, in Triton, without gathering them.

The arithmetic is that of FlashAttention 2 (Dao, 2023): one pass over the context, block by block, keeping for each row
its largest score, the sum of its weights and its weighted values. A row's result does not depend on other sequences.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_block(
    mixed, total, largest, q, keys, pages, start, place, first_seen, end, scale, softcap, window,
    pool_page, pool_side, pool_slot,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """What rows have of tokens [start, start + BLOCK) added to what they have; IS_WHOLE: every row sees all of them.

    Of the context nothing before first_seen and from `end` on is read. Scores are in powers of two.
    """
    token, dims = start + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    known = (token < end) if IS_WHOLE else ((token >= first_seen) & (token < end))
    page = tl.load(pages + token // PAGE_SIZE, mask=known, other=0).to(tl.int64)
    where = (page * pool_page + (token % PAGE_SIZE) * pool_slot)[:, None] + dims[None, :]
    if IS_WHOLE and DIMS == HEAD_DIM:
        key = tl.load(keys + where)
    else:
        key = tl.load(keys + where, mask=known[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    key = key.to(q.dtype)  # exact also of floats of eight bits
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    if HAS_CAP:
        scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * 1.4426950408889634 / softcap)) + 1))
    scores = scores * 1.4426950408889634
    if not IS_WHOLE:
        seen = (token[None, :] <= place[:, None]) & (token[None, :] > place[:, None] - window) & known[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    shift = now if IS_WHOLE else tl.where(now == float("-inf"), 0.0, now)  # a row may have seen nothing yet
    weights, fade = tl.exp2(scores - shift[:, None]), tl.exp2(largest - shift)
    if IS_WHOLE and DIMS == HEAD_DIM:
        value = tl.load(keys + pool_side + where)
    else:
        value = tl.load(keys + pool_side + where, mask=known[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    value = value.to(q.dtype)
    mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return mixed, total * fade + tl.sum(weights, 1), now


# Tables are as wide as a batch wants: no kernel more for a width, which would be compiled while requests wait.
@triton.jit(do_not_specialize=["table_row"])
def attend_tile(
    query, pool, table, tiles, result,
    scale, softcap, window,
    query_row, query_head, pool_page, pool_side, pool_head, pool_slot, table_row, result_row, result_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One program: some consecutive rows of one sequence, each with the GROUP query heads of one kv head.

    tiles (programs, 4) int32: sequence, packed row of the first, how many, position of the first. ROWS is at least
    GROUP times as many. Blocks that every row sees whole are computed without masks.
    """
    tile, kv_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    sequence, first_row = tl.load(tile).to(tl.int64), tl.load(tile + 1).to(tl.int64)
    num_rows, position = tl.load(tile + 2), tl.load(tile + 3)
    line, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row = line // GROUP
    head = kv_head * GROUP + line % GROUP
    inside = (row < num_rows)[:, None] & (dims < HEAD_DIM)[None, :]
    packed = first_row + row
    q = tl.load(query + (packed * query_row + head * query_head)[:, None] + dims[None, :], mask=inside, other=0.0)
    keys, pages = pool + kv_head * pool_head, table + sequence * table_row
    place = position + tl.minimum(row, num_rows - 1)  # what is not there computes what the last row does
    end = position + num_rows
    first_seen = tl.maximum(position + 1 - window, 0)
    begin = first_seen // BLOCK * BLOCK
    whole_end = tl.maximum((position + 1) // BLOCK * BLOCK, begin)
    whole_begin = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), BLOCK) * BLOCK, whole_end)
    whole_begin = tl.maximum(whole_begin, begin)
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    total, largest = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(begin, whole_begin, BLOCK):
        mixed, total, largest = add_block(
            mixed, total, largest, q, keys, pages, start, place, first_seen, end, scale, softcap, window,
            pool_page, pool_side, pool_slot, HEAD_DIM, DIMS, PAGE_SIZE, BLOCK, HAS_CAP, False,
        )  # fmt: skip
    for start in range(whole_begin, whole_end, BLOCK):
        mixed, total, largest = add_block(
            mixed, total, largest, q, keys, pages, start, place, first_seen, end, scale, softcap, window,
            pool_page, pool_side, pool_slot, HEAD_DIM, DIMS, PAGE_SIZE, BLOCK, HAS_CAP, True,
        )  # fmt: skip
    for start in range(whole_end, end, BLOCK):
        mixed, total, largest = add_block(
            mixed, total, largest, q, keys, pages, start, place, first_seen, end, scale, softcap, window,
            pool_page, pool_side, pool_slot, HEAD_DIM, DIMS, PAGE_SIZE, BLOCK, HAS_CAP, False,
        )  # fmt: skip
    target = result + (packed * result_row + head * result_head)[:, None] + dims[None, :]
    tl.store(target, (mixed / total[:, None]).to(result.dtype.element_ty), mask=inside)
