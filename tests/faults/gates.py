"""Gates at the layer boundaries of a send: a test closes one, sees an engine arrive, does something, and opens it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Gate:
    """Closed: the engine that comes here stands still between two layers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None

    async def reached(self) -> None:
        """Returns when an engine stands here."""
        # Blocks until the engine opens its end: that is the event.
        self._held = await asyncio.to_thread(os.open, self._path, os.O_WRONLY)

    def open(self) -> None:
        """Lets it go on, and everybody after it. Again is no error."""
        if self._path.is_fifo():
            _put_file(self._path)
        if self._held is not None:
            os.close(self._held)
            self._held = None


class LayerGates:
    """One gate a layer, all open at first. Several engines may share them, if one sends at a time."""

    def __init__(self, folder: Path, layer_count: int) -> None:
        folder.mkdir()
        self._paths = [folder / f"layer-{layer}" for layer in range(layer_count)]
        for path in self._paths:
            _put_file(path)

    @property
    def options(self) -> list[str]:
        """Command line of an engine that passes these gates."""
        return ["--fault-points", ",".join(f"send.layer.{i}=hold:{path}" for i, path in enumerate(self._paths))]

    @contextmanager
    def closed(self, layer: int) -> Iterator[Gate]:
        """Inside, the gate behind `layer` is closed until it is opened."""
        path = self._paths[layer]
        path.unlink()
        os.mkfifo(path)
        gate = Gate(path)
        try:
            yield gate
        finally:
            gate.open()


def _put_file(path: Path) -> None:
    """An empty file is read to its end at once; it takes the place of what stood there in one step."""
    new = path.with_suffix(".open")
    new.touch()
    new.replace(path)
