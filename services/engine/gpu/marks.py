"""Places in the queue of a GPU, and the layers of a step that are told of as the GPU passes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """A place behind work that was queued. torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Returns when the device has passed it. Raises what went wrong with the work."""


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def mark_on(device: torch.device) -> Mark:
    """A mark behind all that this thread has queued; where nothing is queued it has been passed."""
    if device.type != "cuda":
        return _Passed()
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def finish(device: torch.device) -> None:
    """Waits for all that is queued, by any thread. Raises what went wrong with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LayerMarks:
    """Tells of layers in their order, each once its KV is in the pages, while later ones are queued without waiting."""

    def __init__(self, on_layer: Callable[[int], None], new_mark: Callable[[], Mark]) -> None:
        self._on_layer = on_layer
        self._new_mark = new_mark
        self._ahead: deque[tuple[int, Mark]] = deque()

    def queued(self, layer: int) -> None:
        """The writes of `layer` are queued. Tells of what the device has done by now; waits for nothing."""
        self._ahead.append((layer, self._new_mark()))
        while self._ahead and self._ahead[0][1].query():
            self._on_layer(self._ahead.popleft()[0])

    def finish(self) -> None:
        """Waits for each layer that was not told of, and tells."""
        while self._ahead:
            layer, mark = self._ahead.popleft()
            mark.synchronize()
            self._on_layer(layer)
