"""A download's progress on standard error: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class DownloadProgress(Protocol):
    """Where a download reports how far it is."""

    def update(self, done: int, total: int) -> None:
        """Bytes here, and bytes in all."""

    def note(self, text: str) -> None:
        """Something worth a line."""


@contextmanager
def download_progress(title: str, shown: bool) -> Iterator[DownloadProgress]:
    """Shows a download until the block ends, or nothing of it."""
    console = Console(stderr=True)
    if not shown:
        yield _Nothing()
        return
    if not console.is_terminal:
        yield _Lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as display:
        yield _Bar(display, title)


class _Nothing:
    def update(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Bar:
    def __init__(self, display: Progress, title: str) -> None:
        self._display, self._task = display, display.add_task(title, total=None)

    def update(self, done: int, total: int) -> None:
        self._display.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._display.console.print(text)


class _Lines:
    def __init__(self, title: str) -> None:
        self._title, self._next_tenth = title, 0

    def update(self, done: int, total: int) -> None:
        tenth = done * 10 // total
        if tenth >= self._next_tenth:
            self._next_tenth = tenth + 1
            self.note(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB")

    def note(self, text: str) -> None:
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)
