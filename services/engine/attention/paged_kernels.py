"""Attention over paged float32 KV on the CPU, as kernels of a team.

Two kernels attend, because a decoding row uses every key once and a chunk of a prompt uses it for all its rows:
- attend_row: one row of one sequence, the query heads of one kv head. Pages are read where they lie.
- attend_block: some rows of one sequence as 96 lanes, a lane a query head of a row, and keys in blocks of 64 with a
  running maximum (online softmax, Milakov and Gimelshein, arXiv 1805.02867), so that both products are tiles.

The arguments of both jobs, in order, are those that PagedNumbaAttention.add_to gives them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from services.engine.kernels.facts import BLOCKS, MAX_PAGES, NUM_FACTS, SINGLES, TABLES
from services.engine.kernels.functions import LOG2_E, power_of_2, tanh
from services.engine.kernels.machine_code import compiled, kernel
from services.engine.kernels.memory import as_float, floats, int32s, int64s, prefetch
from services.engine.kernels.softmax import weigh_tile
from services.engine.kernels.tiles import dot_tile, float_tile
from services.engine.kernels.writer import LANES

BLOCK_LANES = 96
BLOCK_TOKENS = 64
HIDDEN = np.float32(-1e30)

_scores_8, _scores_1 = float_tile(8, 3), float_tile(1, 3)
_mix_6x4, _mix_6x1 = float_tile(6, 4), float_tile(6, 1)
_mix_4x4, _mix_4x1, _mix_1x4, _mix_1x1 = float_tile(4, 4), float_tile(4, 1), float_tile(1, 4), float_tile(1, 1)
_weigh = weigh_tile(BLOCK_LANES // LANES)
_dots_16, _dots_1 = dot_tile(16), dot_tile(1)


@compiled
def _cap(values: Any, softcap: Any) -> None:
    """values become log2(e) * softcap * tanh(values)."""
    for index in range(values.shape[0]):
        values[index] = softcap * np.float32(LOG2_E) * tanh(values[index])


@compiled
def _softmax(values: Any) -> None:
    """values, in units of log2(e), become their softmax."""
    best = values[0]
    for index in range(values.shape[0]):
        best = max(best, values[index])
    total = np.float32(0)
    for index in range(values.shape[0]):
        values[index] = power_of_2(values[index] - best)
        total += values[index]
    for index in range(values.shape[0]):
        values[index] /= total


@compiled
def _prefetch(address: int, size: int) -> None:
    for offset in range(0, size, 64):
        prefetch(address + offset)


@compiled
def _add_mixed(
    out: int, num_rows: int, weights: int, row: int, step: int, value: int, count: int, head_dim: int
) -> None:
    """out (num_rows, head_dim) += weights (num_rows, count) times values (count, head_dim), all by address.

    A weight's row and column lie `row` and `step` bytes apart. num_rows is 1 or a multiple of 4.
    """
    width = head_dim * 4
    for first in range(0, num_rows, 4):
        for element in range(0, head_dim, 64):
            left, to = weights + first * row, out + first * width + element * 4
            if num_rows == 1 and element + 64 <= head_dim:
                _mix_1x4(left, row, step, value + element * 4, 64, width, count, to, width, 1)
            elif element + 64 <= head_dim:
                _mix_4x4(left, row, step, value + element * 4, 64, width, count, to, width, 1)
            else:
                for rest in range(element, head_dim, LANES):
                    at = out + first * width + rest * 4
                    if num_rows == 1:
                        _mix_1x1(left, row, step, value + rest * 4, 64, width, count, at, width, 1)
                    else:
                        _mix_4x1(left, row, step, value + rest * 4, 64, width, count, at, width, 1)


def _attend_row(job: Any, chunk: int) -> None:
    mixed, query, pool, facts = job[0], job[1], job[2], int64s(job[3], (NUM_FACTS,))
    kv_heads, page_size, head_dim, group, window = job[4], job[5], job[6], job[7], job[8]
    scale, softcap = as_float(np.int32(job[9])), as_float(np.int32(job[10]))
    kv_head = chunk % kv_heads
    found = int32s(facts[SINGLES] + chunk // kv_heads * 12, (3,))  # of this row: packed row, sequence, tokens it sees
    row, context = np.int64(found[0]), np.int64(found[2])
    table = int32s(facts[TABLES] + np.int64(found[1]) * facts[MAX_PAGES] * 4, (facts[MAX_PAGES],))
    width, num_weights = head_dim * 4, group if group == 1 else (group + 3) // 4 * 4
    first = max(0, context - window)
    begin = first // page_size * page_size
    weights = np.zeros((num_weights, context - begin), dtype=np.float32)
    page_bytes = 2 * kv_heads * page_size * width
    heads = floats(query + (row * kv_heads + kv_head) * group * width, (group, head_dim))
    scaled = np.empty((group, head_dim), dtype=np.float32)
    for member in range(group):
        for element in range(head_dim):
            scaled[member, element] = heads[member, element] * scale
    token = begin
    values = kv_heads * page_size * width  # from a page's keys to its values
    while token < context:
        page = pool + np.int64(table[token // page_size]) * page_bytes + kv_head * page_size * width
        count = min(page_size, context - token)
        # The processor foresees no jump to another page.
        _prefetch(page + values, count * width)
        if token + count < context:
            following = pool + np.int64(table[token // page_size + 1]) * page_bytes + kv_head * page_size * width
            _prefetch(following, min(page_size, context - token - count) * width)
        for member in range(group):
            offset = 0
            to = weights.ctypes.data + (member * (context - begin) + token - begin) * 4
            while offset + 16 <= count:
                _dots_16(page + offset * width, width, scaled.ctypes.data + member * width, head_dim, to + offset * 4)
                offset += 16
            while offset < count:
                _dots_1(page + offset * width, width, scaled.ctypes.data + member * width, head_dim, to + offset * 4)
                offset += 1
        token += count
    for member in range(group):
        seen = weights[member, first - begin :]
        if softcap > 0:
            _cap(seen, softcap)
        _softmax(seen)
        weights[member, : first - begin] = np.float32(0)
    result = np.zeros((num_weights, head_dim), dtype=np.float32)
    token = begin
    while token < context:
        page = pool + np.int64(table[token // page_size]) * page_bytes + (kv_heads + kv_head) * page_size * width
        count = min(page_size, context - token)
        at = weights.ctypes.data + (token - begin) * 4
        _add_mixed(result.ctypes.data, num_weights, at, (context - begin) * 4, 4, page, count, head_dim)
        token += count
    target = floats(mixed + (row * kv_heads * group + kv_head * group) * width, (group, head_dim))
    for member in range(group):
        target[member] = result[member]


@compiled
def _score_page(scores: int, key: int, count: int, packed: int, head_dim: int) -> None:
    """scores (count, 96) = keys (count, head_dim) times packed queries (6, head_dim, 16), all by address."""
    width, row = head_dim * 4, BLOCK_LANES * 4
    token = 0
    while token < count:
        for panel in range(0, BLOCK_LANES // LANES, 3):
            right, to = packed + panel * width * LANES, scores + token * row + panel * LANES * 4
            if token + 8 <= count:
                _scores_8(key + token * width, width, 4, right, width * LANES, LANES * 4, head_dim, to, row, 0)
            else:
                _scores_1(key + token * width, width, 4, right, width * LANES, LANES * 4, head_dim, to, row, 0)
        token += 8 if token + 8 <= count else 1


@compiled
def _hide(scores: Any, start: int, firsts: Any, limits: Any) -> None:
    """Tokens start, start + 1, ... that a lane does not see."""
    for token in range(scores.shape[0]):
        for lane in range(BLOCK_LANES):
            is_hidden = start + token >= limits[lane] or start + token < firsts[lane]
            scores[token, lane] = HIDDEN if is_hidden else scores[token, lane]


@compiled
def _scale_lanes(sums: Any, factors: Any) -> None:
    """sums (96, head_dim) times factors (96,), of which most are 1."""
    for lane in range(BLOCK_LANES):
        factor = factors[lane]
        if factor != np.float32(1):
            for element in range(sums.shape[1]):
                sums[lane, element] *= factor


@compiled
def _copy(source: int, target: int, count: int) -> None:
    """So many float32, by address."""
    values, copies = floats(source, (count,)), floats(target, (count,))
    for index in range(count):
        copies[index] = values[index]


@compiled
def _add_mixed_lanes(sums: int, scores: int, values: int, count: int, head_dim: int) -> None:
    """sums (96, head_dim) += weights (count, 96), transposed, times values (count, head_dim), all by address."""
    width, row = head_dim * 4, BLOCK_LANES * 4
    for lane in range(0, BLOCK_LANES, 6):
        left, to = scores + lane * 4, sums + lane * width
        element = 0
        while element < head_dim:
            value, at = values + element * 4, to + element * 4
            if element + 64 <= head_dim:
                _mix_6x4(left, 4, row, value, 64, width, count, at, width, 1)
                element += 64
            else:
                _mix_6x1(left, 4, row, value, 64, width, count, at, width, 1)
                element += LANES


def _attend_block(job: Any, chunk: int) -> None:
    mixed, query, pool, facts = job[0], job[1], job[2], int64s(job[3], (NUM_FACTS,))
    kv_heads, page_size, head_dim, group, window = job[4], job[5], job[6], job[7], job[8]
    scale, softcap = as_float(np.int32(job[9])), as_float(np.int32(job[10]))
    kv_head = chunk % kv_heads
    # Of this block: first packed row, sequence, tokens that row sees, rows.
    found = int32s(facts[BLOCKS] + chunk // kv_heads * 16, (4,))
    row, context, num_rows = np.int64(found[0]), np.int64(found[2]), np.int64(found[3])
    table = int32s(facts[TABLES] + np.int64(found[1]) * facts[MAX_PAGES] * 4, (facts[MAX_PAGES],))
    num_heads, width = kv_heads * group, head_dim * 4
    queries = floats(query + row * num_heads * width, (num_rows, num_heads, head_dim))
    packed = np.zeros((BLOCK_LANES // LANES, head_dim, LANES), dtype=np.float32)
    firsts, limits = np.zeros(BLOCK_LANES, dtype=np.int32), np.empty(BLOCK_LANES, dtype=np.int32)
    last = context + num_rows - 1  # tokens that the last row sees
    limits[:] = last
    for lane in range(num_rows * group):
        limits[lane] = context + lane // group
        firsts[lane] = max(0, limits[lane] - window)
        vector = queries[lane // group, kv_head * group + lane % group]
        for element in range(head_dim):
            packed[lane // LANES, element, lane % LANES] = vector[element] * scale
    scores = np.empty((BLOCK_TOKENS, BLOCK_LANES), dtype=np.float32)
    flat = scores.reshape(BLOCK_TOKENS * BLOCK_LANES)
    together = np.empty((BLOCK_TOKENS, head_dim), dtype=np.float32)  # values of a block's tokens, out of their pages
    best, totals = np.full(BLOCK_LANES, HIDDEN, dtype=np.float32), np.zeros(BLOCK_LANES, dtype=np.float32)
    shrink, sums = np.empty(BLOCK_LANES, dtype=np.float32), np.zeros((BLOCK_LANES, head_dim), dtype=np.float32)
    page_bytes, value_offset = 2 * kv_heads * page_size * width, kv_heads * page_size * width
    start = max(0, context - window) // BLOCK_TOKENS * BLOCK_TOKENS
    while start < last:
        stop = min(start + BLOCK_TOKENS, last)
        token = start
        while token < stop:
            count = min(page_size - token % page_size, stop - token)
            key = pool + np.int64(table[token // page_size]) * page_bytes
            key += (kv_head * page_size + token % page_size) * width
            to = scores.ctypes.data + (token - start) * BLOCK_LANES * 4
            _score_page(to, key, count, packed.ctypes.data, head_dim)
            token += count
        if softcap > 0:
            _cap(flat[: (stop - start) * BLOCK_LANES], softcap)
        if stop > context or start < last - window:
            _hide(scores[: stop - start], start, firsts, limits)
        # A hidden token weighs 2 ** -126, which rounding takes away; so does `shrink` with what a lane counted before
        # it saw its first token.
        addresses = best.ctypes.data, totals.ctypes.data, shrink.ctypes.data
        _weigh(scores.ctypes.data, BLOCK_LANES * 4, stop - start, *addresses)
        _scale_lanes(sums, shrink)
        token = start
        while token < stop:
            count = min(page_size - token % page_size, stop - token)
            value = pool + np.int64(table[token // page_size]) * page_bytes + value_offset
            value += (kv_head * page_size + token % page_size) * width
            _copy(value, together.ctypes.data + (token - start) * width, count * head_dim)
            token += count
        _add_mixed_lanes(sums.ctypes.data, scores.ctypes.data, together.ctypes.data, stop - start, head_dim)
        start = stop
    target = floats(mixed + row * num_heads * width, (num_rows, num_heads, head_dim))
    for lane in range(num_rows * group):
        for element in range(head_dim):
            target[lane // group, kv_head * group + lane % group, element] = sums[lane, element] / totals[lane]


def _write(job: Any, chunk: int) -> None:
    key, value, key_stride, value_stride, pool, slots = job[0], job[1], job[2], job[3], job[4], job[5]
    num_tokens, tokens_a_chunk, kv_heads, page_size, head_dim = job[6], job[7], job[8], job[9], job[10]
    pages = floats(pool, (1 << 40, 2, kv_heads, page_size, head_dim))
    places = int64s(slots, (num_tokens,))
    for token in range(chunk * tokens_a_chunk, min((chunk + 1) * tokens_a_chunk, num_tokens)):
        page, offset = places[token] // page_size, places[token] % page_size
        keys = floats(key + token * key_stride, (kv_heads, head_dim))
        values = floats(value + token * value_stride, (kv_heads, head_dim))
        for head in range(kv_heads):
            for element in range(head_dim):
                pages[page, 0, head, offset, element] = keys[head, element]
                pages[page, 1, head, offset, element] = values[head, element]


write = kernel(_write)
attend_row = kernel(_attend_row)
attend_block = kernel(_attend_block)
