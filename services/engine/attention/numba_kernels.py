"""Attention over paged float32 KV on the CPU, compiled by numba at first use and kept on disk from then on.

numba keeps the machine code beside this file, or in the user's cache folder where that is not writable.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# NaN of unused slots is never read, so only a broken model could bring one here, and then only into its own row.
FAST_MATH = {"reassoc", "contract", "nsz", "arcp", "nnan"}


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles at first call, once for each memory arrangement of the arguments; releases the GIL while running."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    try:
        kernel: Callable[..., None] = njit(cache=True, **options)(function)
    except RuntimeError as error:  # neither folder is writable
        logging.getLogger(__name__).warning("kernels are compiled anew at every start: %s", error)
        kernel = njit(**options)(function)
    return kernel


@compiled
def _score(scores: Floats, query: Floats, pool: Floats, table: Ints, kv_head: int, first: int, context: int) -> None:
    """scores (group, >= context) from the page of token `first` on = the query heads (group, head_dim) times the keys.

    The heads take turns over a page while it is in the cache; four tokens at a time give four independent sums.
    """
    page_size, head_dim = pool.shape[3], pool.shape[4]
    for page_index in range(first // page_size, (context + page_size - 1) // page_size):
        start = page_index * page_size
        count = min(page_size, context - start)
        page = pool[table[page_index], 0, kv_head]
        for member in range(query.shape[0]):
            vector, target = query[member], scores[member]
            token = 0
            while token + 4 <= count:
                key0, key1, key2, key3 = page[token], page[token + 1], page[token + 2], page[token + 3]
                sum0 = sum1 = sum2 = sum3 = np.float32(0)
                for element in range(head_dim):
                    factor = vector[element]
                    sum0 += factor * key0[element]
                    sum1 += factor * key1[element]
                    sum2 += factor * key2[element]
                    sum3 += factor * key3[element]
                target[start + token] = sum0
                target[start + token + 1] = sum1
                target[start + token + 2] = sum2
                target[start + token + 3] = sum3
                token += 4
            while token < count:
                key0 = page[token]
                sum0 = np.float32(0)
                for element in range(head_dim):
                    sum0 += vector[element] * key0[element]
                target[start + token] = sum0
                token += 1


@compiled
def _softmax_base_2(scores: Floats, exponents: Ints, context: int) -> None:
    """scores[:context] become 2 ** (score - best), divided by their sum. exponents (>= context,) is scratch.

    2 ** x for x <= 0 is 2 ** n * 2 ** f with |f| <= 1/2: n goes into the exponent bits of a float, a polynomial
    (Cephes' exp2f, error 2e-7) gives 2 ** f. A call of exp would keep the loop from being vectorised.
    """
    powers = exponents.view(np.float32)
    best = scores[0]
    for token in range(context):
        best = max(best, scores[token])
    for token in range(context):
        power = max(scores[token] - best, np.float32(-126))
        whole = np.int32(power - np.float32(0.5))
        part = power - np.float32(whole)
        exponents[token] = (whole + np.int32(127)) << np.int32(23)
        value = np.float32(1.535336188319500e-4)
        value = value * part + np.float32(1.339887440266574e-3)
        value = value * part + np.float32(9.618437357674640e-3)
        value = value * part + np.float32(5.550332471162809e-2)
        value = value * part + np.float32(2.402264791363012e-1)
        value = value * part + np.float32(6.931472028550421e-1)
        scores[token] = value * part + np.float32(1)
    total = np.float32(0)
    for token in range(context):
        scores[token] *= powers[token]
        total += scores[token]
    for token in range(context):
        scores[token] /= total


@compiled
def _mix(mixed: Floats, weights: Floats, pool: Floats, table: Ints, kv_head: int, first: int, context: int) -> None:
    """mixed (group, head_dim) = weights (group, >= context) times the values from the page of token `first` on."""
    page_size, head_dim = pool.shape[3], pool.shape[4]
    mixed[:] = np.float32(0)
    for page_index in range(first // page_size, (context + page_size - 1) // page_size):
        start = page_index * page_size
        count = min(page_size, context - start)
        page = pool[table[page_index], 1, kv_head]
        for member in range(mixed.shape[0]):
            target, weight = mixed[member], weights[member]
            token = 0
            while token + 4 <= count:
                value0, value1, value2, value3 = page[token], page[token + 1], page[token + 2], page[token + 3]
                weight0, weight1 = weight[start + token], weight[start + token + 1]
                weight2, weight3 = weight[start + token + 2], weight[start + token + 3]
                for element in range(head_dim):
                    target[element] += (
                        weight0 * value0[element]
                        + weight1 * value1[element]
                        + weight2 * value2[element]
                        + weight3 * value3[element]
                    )
                token += 4
            while token < count:
                weight0, value0 = weight[start + token], page[token]
                for element in range(head_dim):
                    target[element] += weight0 * value0[element]
                token += 1


@compiled
def attend_rows(
    mixed: Floats,  # (num_tokens, num_heads, head_dim), out
    query: Floats,  # (num_tokens, num_heads, head_dim), already multiplied by log2(e) and the scale
    pool: Floats,  # (num_pages, 2, num_kv_heads, page_size, head_dim)
    sequences: Ints,  # (n,) which sequences of the batch to compute
    query_starts: Ints,  # (num_sequences + 1,)
    context_lengths: Ints,  # (num_sequences,)
    block_tables: Ints,  # (num_sequences, max_pages)
    window: int,  # tokens that a row sees at most
    weights: Floats,  # (num_heads / num_kv_heads, longest context), scratch
    exponents: Ints,  # (longest context,), scratch
) -> None:
    """Every row by itself; pages are read where they lie, once for all query heads of a kv head."""
    group = weights.shape[0]
    for sequence in sequences:
        first, last = query_starts[sequence], query_starts[sequence + 1]
        for row in range(first, last):
            context = context_lengths[sequence] - (last - row) + 1
            first = max(0, context - window)
            for kv_head in range(pool.shape[2]):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                _score(weights, query[row, heads], pool, block_tables[sequence], kv_head, first, context)
                for member in range(group):
                    _softmax_base_2(weights[member, first:], exponents, context - first)
                    weights[member, first // pool.shape[3] * pool.shape[3] : first] = np.float32(0)
                _mix(mixed[row, heads], weights, pool, block_tables[sequence], kv_head, first, context)
