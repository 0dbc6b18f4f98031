"""What a push must leave in the receiver's pool, worked out token by token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.kvtransfer.engine import FakeEngine


def expected(
    before: NDArray[np.uint8],
    target: FakeEngine,
    source: FakeEngine,
    begin: int,
    end: int,
    source_pages: list[int],
    target_pages: list[int],
    *,
    layers: int | None = None,
    window_begin: int | None = None,
) -> NDArray[np.uint8]:
    """`before` with the tokens [begin, end) of the first `layers` layers moved; all layers if None.

    `target_pages` begin at `window_begin` (begin, if None), `source_pages` at begin.
    """
    after = before.copy().reshape(target.tokens.shape)
    page_size = target.shape.page_size
    first_target = (begin if window_begin is None else window_begin) // page_size
    for layer in range(target.shape.layers if layers is None else layers):
        for position in range(begin, end):
            page, token = divmod(position, page_size)
            from_page = source_pages[page - begin // page_size]
            to_page = target_pages[page - first_target]
            after[layer, to_page, :, token] = source.tokens[layer, from_page, :, token]
    return after.reshape(-1)
