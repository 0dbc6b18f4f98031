"""What a decoder computes between its linear layers, on the CPU in float32, as kernels of a team: a chunk is some rows.

The arguments of a job are addresses, sizes and the bits of float32 numbers, in the order in which each kernel takes
them apart. Rows lie one after the other without gaps.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from services.engine.kernels.facts import NUM_FACTS, POSITIONS, SLOTS, TOKEN_IDS
from services.engine.kernels.functions import sigmoid
from services.engine.kernels.machine_code import compiled, kernel
from services.engine.kernels.memory import as_float, floats, int64s

SILU, GELU_TANH, GELU = range(3)
_ONE_OVER_ROOT_2 = np.float32(math.sqrt(0.5))
_TWICE_ROOT_2_OVER_PI = np.float32(2 * math.sqrt(2 / math.pi))


def _embed(job: Any, chunk: int) -> None:
    facts, table, out, num_rows, size, rows_a_chunk = job[0], job[1], job[2], job[3], job[4], job[5]
    scale = as_float(np.int32(job[6]))
    token_ids = int64s(int64s(facts, (NUM_FACTS,))[TOKEN_IDS], (num_rows,))
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        source, target = floats(table + token_ids[row] * size * 4, (size,)), floats(out + row * size * 4, (size,))
        for index in range(size):
            target[index] = source[index] * scale


@compiled
def _scale_of_norm(values: Any, epsilon: Any) -> Any:
    total = np.float32(0)
    for index in range(values.shape[0]):
        total += values[index] * values[index]
    return np.float32(1) / np.sqrt(total / np.float32(values.shape[0]) + epsilon)


def _add_norm(job: Any, chunk: int) -> None:
    rows, added, weight, out, num_rows, size, rows_a_chunk = job[0], job[1], job[2], job[3], job[4], job[5], job[6]
    epsilon, weights = as_float(np.int32(job[7])), floats(weight, (size,))
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        values, normed = floats(rows + row * size * 4, (size,)), floats(out + row * size * 4, (size,))
        if added != 0:
            more = floats(added + row * size * 4, (size,))
            for index in range(size):
                values[index] += more[index]
        scale = _scale_of_norm(values, epsilon)
        for index in range(size):
            normed[index] = values[index] * scale * weights[index]


def _add(job: Any, chunk: int) -> None:
    rows, added, num_rows, size, rows_a_chunk = job[0], job[1], job[2], job[3], job[4]
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        values, more = floats(rows + row * size * 4, (size,)), floats(added + row * size * 4, (size,))
        for index in range(size):
            values[index] += more[index]


@compiled
def _rotate(source: int, weight: int, cosines: Any, sines: Any, target: int, epsilon: Any) -> None:
    """One head from `source` to `target`: normed, if there is a weight, and rotated; see rope.py."""
    size = cosines.shape[0]
    half = size // 2
    values, rotated = floats(source, (size,)), floats(target, (size,))
    if weight == 0:
        for index in range(half):
            first, second = values[index], values[index + half]
            rotated[index] = first * cosines[index] - second * sines[index]
            rotated[index + half] = second * cosines[index + half] + first * sines[index + half]
        return
    weights, scale = floats(weight, (size,)), _scale_of_norm(values, epsilon)
    for index in range(half):
        first = values[index] * scale * weights[index]
        second = values[index + half] * scale * weights[index + half]
        rotated[index] = first * cosines[index] - second * sines[index]
        rotated[index + half] = second * cosines[index + half] + first * sines[index + half]


def _rotate_and_store(job: Any, chunk: int) -> None:
    projected, query, pool, norm, cosine, sine = job[1], job[2], job[3], job[4], job[5], job[6]
    num_rows, rows_a_chunk, num_heads, kv_heads, page_size, head_dim = job[7], job[8], job[9], job[10], job[11], job[12]
    epsilon, facts = as_float(np.int32(job[13])), int64s(job[0], (NUM_FACTS,))
    positions, slots = int64s(facts[POSITIONS], (num_rows,)), int64s(facts[SLOTS], (num_rows,))
    width = head_dim * 4
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        heads = projected + row * (num_heads + 2 * kv_heads) * width
        cosines = floats(cosine + positions[row] * width, (head_dim,))
        sines = floats(sine + positions[row] * width, (head_dim,))
        page, offset = slots[row] // page_size, slots[row] % page_size
        for head in range(num_heads + kv_heads):
            if head < num_heads:
                target = query + (row * num_heads + head) * width
            else:
                target = pool + ((page * 2 * kv_heads + head - num_heads) * page_size + offset) * width
            weight = 0 if norm == 0 else norm + head * width
            _rotate(heads + head * width, weight, cosines, sines, target, epsilon)
        for head in range(kv_heads):
            source = floats(heads + (num_heads + kv_heads + head) * width, (head_dim,))
            place = pool + (((page * 2 + 1) * kv_heads + head) * page_size + offset) * width
            value = floats(place, (head_dim,))
            for index in range(head_dim):
                value[index] = source[index]


def _activate(job: Any, chunk: int) -> None:
    gate_up, out, num_rows, size, rows_a_chunk, kind = job[0], job[1], job[2], job[3], job[4], job[5]
    for row in range(chunk * rows_a_chunk, min((chunk + 1) * rows_a_chunk, num_rows)):
        gate, up = floats(gate_up + row * size * 8, (size,)), floats(gate_up + (row * 2 + 1) * size * 4, (size,))
        result = floats(out + row * size * 4, (size,))
        if kind == SILU:
            for index in range(size):
                result[index] = gate[index] * sigmoid(gate[index]) * up[index]
        elif kind == GELU_TANH:
            for index in range(size):
                value = gate[index]
                inner = value + np.float32(0.044715) * value * value * value
                # (1 + tanh(x)) / 2 is the sigmoid of 2 x.
                result[index] = value * sigmoid(_TWICE_ROOT_2_OVER_PI * inner) * up[index]
        else:
            for index in range(size):
                value = gate[index]
                share = np.float32(0.5) * (np.float32(1) + np.float32(math.erf(value * _ONE_OVER_ROOT_2)))
                result[index] = value * share * up[index]


embed = kernel(_embed)
add_norm = kernel(_add_norm)
add = kernel(_add)
rotate_and_store = kernel(_rotate_and_store)
activate = kernel(_activate)
