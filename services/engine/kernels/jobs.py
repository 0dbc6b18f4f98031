"""Jobs put together once and computed as often as wanted, each time in one call of compiled code.

A step of a model is some hundred jobs that always come in the same order over the same memory: only the addresses of
what is new in a step differ, so kernels find those through one more address, that of `Jobs.facts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.kernels.facts import NUM_FACTS
from services.engine.kernels.team import Team, address


class Memory:
    """Buffers that recordings share because only one of them runs at a time: the n-th that each takes is the same."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def take(self, phase: int, number: int, num_bytes: int) -> Tensor:
        """Bytes of one buffer; it grows for who comes later, and those who have a smaller one keep that."""
        buffer = self._buffers.get((phase, number))
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[phase, number] = torch.empty(num_bytes, dtype=torch.uint8)
        return buffer[:num_bytes]


class Jobs:
    """A list of jobs and the memory between them. One thread at a time.

    Adding a job computes nothing: what is taken holds values when run() has come past the job that writes it.
    """

    def __init__(self, team: Team, memory: Memory | None = None) -> None:
        self.team = team
        self.facts = np.zeros(NUM_FACTS, dtype=np.int64)  # what is new in each run
        self._memory = memory
        self._arguments: list[int] = []  # of all jobs, one job after the other
        self._entries: list[tuple[int, int, int]] = []  # of each job: kernel, its first argument's place, chunks
        self._marks: list[int] = []
        self._num_taken = 0
        self._kept: list[Any] = []
        self._program = np.empty((0, 3), dtype=np.int64)

    def add(self, kernel: int, num_chunks: int, *arguments: Any) -> None:
        """Puts a job at the end. Tensors and arrays among the arguments stay alive as long as this list."""
        self._entries.append((kernel, len(self._arguments), num_chunks))
        self._arguments.extend(map(address, arguments))
        self.keep(arguments)

    def keep(self, values: Any) -> None:
        """What jobs find by an address within one of their arguments, stays alive as long as this list."""
        self._kept.append(values)

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for what one job writes and others read, until the next but one mark. Its content is undefined."""
        if self._memory is None:
            return torch.empty(shape, dtype=dtype)
        self._num_taken += 1
        num_bytes = math.prod(shape) * dtype.itemsize
        return self._memory.take(len(self._marks) % 2, self._num_taken, num_bytes).view(dtype).view(shape)

    def mark(self) -> None:
        """Remembers this place: run() says when it has come here."""
        self._marks.append(len(self._entries))
        self._num_taken = 0

    def run(self, on_mark: Callable[[int], None] | None = None) -> None:
        """Computes all jobs in order; on_mark(n) is called between them at the n-th mark."""
        if len(self._program) != len(self._entries):
            self._program = self._assemble()
        begin = 0
        for number, end in enumerate(self._marks if on_mark is not None else ()):
            self.team.run_all(self._program[begin:end])
            begin = end
            if on_mark is not None:
                on_mark(number)
        self.team.run_all(self._program[begin:])

    def _assemble(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        words = np.array(self._arguments, dtype=np.int64)
        self._kept.append(words)
        program = np.array(self._entries, dtype=np.int64)
        program[:, 1] = words.ctypes.data + program[:, 1] * words.itemsize
        return program


def rows_a_chunk(num_rows: int, row_size: int, team: Team) -> int:
    """How many rows one thread computes at a time of a job whose time is about that of touching row_size elements."""
    fair = -(-num_rows // (_CHUNKS_A_THREAD * team.num_threads))
    return max(fair, -(-_WORTH_SHARING // row_size))


_CHUNKS_A_THREAD = 4
_WORTH_SHARING = 4096  # elements, about a microsecond
