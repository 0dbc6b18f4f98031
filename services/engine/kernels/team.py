"""Threads that compute one job together, chunk by chunk.

A step of a small model is a few hundred jobs of some microseconds, too short to wake a thread for each. Helpers
therefore look for the next job for a while before they sleep, and whoever posts a job does every chunk that nobody
has taken: a helper that sleeps, or that the system does not let run, is never waited for.

A job is taken from one word, (ticket << 32) | chunks left, by compare and exchange. A ticket is used once, and a job
ends only after every chunk that was taken is done, so what a taker reads about its job is still true.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from services.engine.kernels.machine_code import compiled
from services.engine.kernels.memory import atomic_add, atomic_load, atomic_store, atomic_swap_if, call_kernel

# Words of the board, each on a cache line of its own.
_LINE, _NUM_LINES = 64, 6
_CLAIM, _DONE, _KERNEL, _JOB, _ASLEEP, _BELL = (_LINE * line for line in range(_NUM_LINES))
_LEFT = 0xFFFFFFFF
# Looks for a job before a helper sleeps, some 0.3 ms: longer than what lies between two jobs of a step.
_PATIENCE = 20_000
_LOOKS_A_YIELD = 16

_let_others_run = types.ExternalFunction("sched_yield", types.int32())
_make_bell: Any = types.ExternalFunction("sem_init", types.int32(types.int64, types.int32, types.uint32))
_await_bell: Any = types.ExternalFunction("sem_wait", types.int32(types.int64))
_ring_bell: Any = types.ExternalFunction("sem_post", types.int32(types.int64))


@compiled
def _take(board: int) -> bool:
    """Computes one chunk, if there is one that nobody has taken; False if there is none."""
    word = atomic_load(board + _CLAIM)
    left = word & _LEFT
    if left == 0:
        return False
    if atomic_swap_if(board + _CLAIM, word, word - 1):
        call_kernel(atomic_load(board + _KERNEL), atomic_load(board + _JOB), left - 1)
        atomic_add(board + _DONE, 1)
    return True


@compiled
def _rouse(board: int) -> None:
    """Wakes the helpers that sleep. One that is about to sleep is woken with the next job."""
    asleep = atomic_load(board + _ASLEEP)
    while asleep > 0:
        if atomic_swap_if(board + _ASLEEP, asleep, asleep - 1):
            _ring_bell(board + _BELL)
        asleep = atomic_load(board + _ASLEEP)


@compiled
def _compute(board: int, kernel: int, job: int, num_chunks: int) -> None:
    """Posts a job and takes part in it until all of it is done."""
    atomic_store(board + _KERNEL, kernel)
    atomic_store(board + _JOB, job)
    atomic_store(board + _DONE, 0)
    ticket = (atomic_load(board + _CLAIM) >> 32) + 1
    atomic_store(board + _CLAIM, (ticket << 32) | num_chunks)
    _rouse(board)
    while _take(board):
        pass
    while atomic_load(board + _DONE) < num_chunks:
        pass


@compiled
def _compute_alone(kernel: int, job: int, num_chunks: int) -> None:
    for chunk in range(num_chunks):
        call_kernel(kernel, job, chunk)


@compiled
def _compute_all(board: int, program: Any) -> None:
    """Each row of `program` is a kernel, the address of its job, and chunks. board 0: by this thread alone."""
    for index in range(program.shape[0]):
        kernel, job, num_chunks = program[index, 0], program[index, 1], program[index, 2]
        if num_chunks == 1 or board == 0:
            _compute_alone(kernel, job, num_chunks)
        else:
            _compute(board, kernel, job, num_chunks)


@compiled
def _help(board: int, patience: int) -> None:
    """Takes part in jobs until so many looks have found none."""
    idle = 0
    while idle < patience:
        if _take(board):
            idle = 0
        else:
            idle += 1
            if idle % _LOOKS_A_YIELD == 0:
                _let_others_run()


@compiled
def _serve(board: int, patience: int) -> None:
    """What a helper does for ever, unless it has no patience. It never needs the GIL: others may hold it for long."""
    while patience > 0:
        _help(board, patience)
        atomic_add(board + _ASLEEP, 1)
        _await_bell(board + _BELL)


@compiled
def _begin(board: int) -> None:
    """Makes an empty board ready."""
    _make_bell(board + _BELL, 0, 0)


class Team:
    """The calling thread and num_threads - 1 helpers. One job at a time: a second caller computes alone."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._lock = threading.Lock()
        words = np.zeros((_NUM_LINES + 1) * 8, dtype=np.int64)
        self._memory = words  # the board is the part of it that begins a cache line
        self._board = words.ctypes.data + -words.ctypes.data % _LINE
        _begin(self._board)
        _serve(self._board, 0)  # compiled or loaded now: in a helper that would fight for the GIL with the first steps
        for number in range(1, num_threads):
            threading.Thread(target=self._help, name=f"team-{number}", daemon=True).start()

    def run(self, kernel: int, job: NDArray[np.int64], num_chunks: int) -> None:
        """Computes all chunks of a job; what its addresses name must stay until then, as it does in the caller."""
        self.run_all(np.array([[kernel, job.ctypes.data, num_chunks]], dtype=np.int64))

    def run_all(self, program: NDArray[np.int64]) -> None:
        """Computes jobs one after the other, (num_jobs, 3): kernel, address of the job, chunks. See Jobs."""
        if self.num_threads == 1 or not self._lock.acquire(blocking=False):
            _compute_all(0, program)
            return
        try:
            _compute_all(self._board, program)
        finally:
            self._lock.release()

    def _help(self) -> None:
        _serve(self._board, _PATIENCE)  # this frame keeps the board


_teams: dict[int, Team] = {}
_teams_lock = threading.Lock()


def team_of(num_threads: int) -> Team:
    """The one team of that size of this process."""
    with _teams_lock:
        if num_threads not in _teams:
            _teams[num_threads] = Team(num_threads)
        return _teams[num_threads]


def addresses(*values: Any) -> NDArray[np.int64]:
    """The arguments of a job: integers as they are, of tensors and arrays their addresses."""
    return np.array([address(value) for value in values], dtype=np.int64)


def address(value: Any) -> int:
    """Where a tensor or an array lies; an integer stands for itself."""
    if isinstance(value, int):
        return value
    return int(value.ctypes.data) if isinstance(value, np.ndarray) else int(value.data_ptr())
