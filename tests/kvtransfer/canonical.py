"""Any layout read value by value from the words of its definition: slow, and obviously right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.protocol.layout import PageLayout, PageOrder


def value_index(layout: PageLayout, half: int, head: int, token: int, element: int) -> int:
    """Where, in the values of one page of one layer, a key's (half 0) or value's (half 1) element lies."""
    heads, tokens, size = layout.kv_head_count, layout.page_size, layout.head_dim
    first = half * heads * tokens * size
    if layout.order is PageOrder.KV_TOKEN_HEAD_DIM:
        return first + (token * heads + head) * size + element
    if layout.order is PageOrder.K_HEAD_DIM_TOKEN and half == 0:
        return first + (head * size + element) * tokens + token
    return first + (head * tokens + token) * size + element


def read_token(
    pool: NDArray[np.uint8], layout: PageLayout, place: tuple[int, int, int], head: int
) -> NDArray[np.uint8]:
    """(k|v, byte) of one head at `place` (layer, page, token in it); `pool` (layers, pages, bytes)."""
    layer, page, token = place
    size = layout.dtype.size_bytes
    read = [
        [pool[layer, page, size * i : size * (i + 1)] for i in _elements(layout, half, head, token)] for half in (0, 1)
    ]
    return np.array(read).reshape(2, -1)


def write_token(
    pool: NDArray[np.uint8], layout: PageLayout, place: tuple[int, int, int], head: int, data: NDArray[np.uint8]
) -> None:
    """The other way round."""
    layer, page, token = place
    size = layout.dtype.size_bytes
    for half in (0, 1):
        for element, i in enumerate(_elements(layout, half, head, token)):
            pool[layer, page, size * i : size * (i + 1)] = data[half, size * element : size * (element + 1)]


def _elements(layout: PageLayout, half: int, head: int, token: int) -> list[int]:
    return [value_index(layout, half, head, token, element) for element in range(layout.head_dim)]
