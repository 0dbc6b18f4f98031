"""The few things of a GPU that moving pages needs. The seam between the transports and the CUDA driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class CudaMissing(Exception):
    """There is no CUDA driver or no GPU to use; the message is a clause for people."""


class CudaFailed(Exception):
    """The driver refused a call."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of device memory to another place in device memory."""

    target: int
    source: int
    num_bytes: int


class Stream(Protocol):
    """A queue of work beside everything else that the GPU does. Used by one thread at a time."""

    @property
    def handle(self) -> int:
        """The driver's CUstream."""

    def copy(self, copies: Sequence[Copy]) -> None:
        """Queues copies; returns at once. Raises CudaFailed."""

    def is_idle(self) -> bool:
        """Whether everything queued has ended. Raises CudaFailed if some of it failed."""

    def synchronize(self) -> None:
        """Returns when everything queued has ended. Raises CudaFailed if some of it failed."""

    def close(self) -> None:
        """Lets go of it."""


class Device(Protocol):
    """One GPU. Any thread."""

    def new_stream(self) -> Stream:
        """A stream of its own. Raises CudaFailed."""

    def allocate(self, num_bytes: int) -> int:
        """Address of new memory, of undefined contents. Raises CudaFailed."""

    def free(self, address: int) -> None:
        """Gives it back."""
