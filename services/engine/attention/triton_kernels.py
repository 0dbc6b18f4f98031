"""Decoding attention over pages of any size on a GPU, in Triton: each context in pieces, then the pieces together.

The arithmetic is that of Flash-Decoding (Dao et al., 2023): every piece keeps its largest score, the sum of its
weights and its weighted values, and pieces are added up after scaling each to the largest score of all. How a
context is cut follows from its own length alone, so no sequence changes another one's result, and the grid does not
depend on lengths, so that a captured graph computes any.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Tables are as wide as a batch wants: no kernel more for a width, which would be compiled while requests wait.
@triton.jit(do_not_specialize=["table_row"])
def attend_piece(
    query, pool, table, contexts, rows, values, stats,
    scale, softcap, window,
    query_row, query_head, pool_page, pool_side, pool_head, pool_slot, table_row, num_splits,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of one kv head of sequence n over one of num_splits pieces of what they see.

    Pieces are equal multiples of BLOCK, LEAST tokens at least; the last ones may be empty.
    values (n, heads, num_splits, HEAD_DIM) and stats (n, heads, num_splits, 2), float32, are written; the two stats
    are the largest score, in powers of two, and the sum of weights. A piece without a token gets -inf and 0.
    """
    n, kv_head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + n)
    sequence = tl.load(rows + 2 * n + 1).to(tl.int64)
    first_seen = tl.maximum(context - window, 0)
    origin = first_seen // BLOCK * BLOCK
    length = tl.maximum(tl.cdiv(tl.cdiv(context - origin, num_splits), BLOCK) * BLOCK, LEAST)
    begin = origin + piece * length
    end = tl.minimum(begin + length, context)
    group, dims = tl.arange(0, GROUP_ROWS), tl.arange(0, DIMS)
    in_group, in_head = group < GROUP, dims < HEAD_DIM
    head = kv_head * GROUP + group
    inside = in_group[:, None] & in_head[None, :]
    packed = tl.load(rows + 2 * n).to(tl.int64)
    q = tl.load(query + packed * query_row + head[:, None] * query_head + dims[None, :], mask=inside, other=0.0)
    largest = tl.full((GROUP_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_ROWS,), tl.float32)
    mixed = tl.zeros((GROUP_ROWS, DIMS), tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        seen = (token >= first_seen) & (token < end)
        page = tl.load(table + sequence * table_row + token // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        place = page * pool_page + kv_head * pool_head + (token % PAGE_SIZE) * pool_slot
        where = place[:, None] + dims[None, :]
        known = seen[:, None] & in_head[None, :]
        key = tl.load(pool + where, mask=known, other=0.0).to(q.dtype)  # exact also of floats of eight bits
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        if HAS_CAP:
            scores = softcap * (1 - 2 / (tl.exp2(scores * (2 * 1.4426950408889634 / softcap)) + 1))
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(largest - shift)
        value = tl.load(pool + pool_side + where, mask=known, other=0.0).to(q.dtype)
        mixed = mixed * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        largest = now
    slot = (n * tl.num_programs(1) * GROUP + head) * num_splits + piece
    tl.store(values + slot[:, None] * HEAD_DIM + dims[None, :], mixed, mask=inside)
    tl.store(stats + slot * 2, largest, mask=in_group)
    tl.store(stats + slot * 2 + 1, total, mask=in_group)


@triton.jit
def add_pieces(
    values, stats, rows, result, result_row, result_head, num_splits,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one head of sequence n, all pieces, into its row of `result`."""
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = (n * tl.num_programs(1) + head) * num_splits
    piece, dims = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    exists, in_head = piece < num_splits, dims < HEAD_DIM
    largest = tl.load(stats + (slot + piece) * 2, mask=exists, other=float("-inf"))
    total = tl.load(stats + (slot + piece) * 2 + 1, mask=exists, other=0.0)
    weight = tl.exp2(largest - tl.max(largest, 0))
    inside = exists[:, None] & in_head[None, :]
    parts = tl.load(values + (slot + piece)[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.sum(total * weight, 0)
    packed = tl.load(rows + 2 * n).to(tl.int64)
    tl.store(result + packed * result_row + head * result_head + dims, mixed.to(result.dtype.element_ty), mask=in_head)
