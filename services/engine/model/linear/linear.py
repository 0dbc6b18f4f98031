"""The seam between models and linear layers, and its plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor

from services.engine.model.linear.blocks import Blocks

if TYPE_CHECKING:  # numba takes a while to load, and engines on a GPU never need it
    from services.engine.kernels.jobs import Jobs
    from services.engine.kernels.team import Team


class Linear(Protocol):
    """A linear layer. A row of the result depends on the same row of the input alone."""

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (num_rows, in) to (num_rows, out), of the same dtype and device."""


class TeamLinear(Linear, Protocol):
    """A layer that a team of threads computes, so that it can be one job among others."""

    def add_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """Adds what computes the layer for rows (num_rows, in), contiguous: (num_rows, out), once the jobs have run."""

    def add_largest_to(self, jobs: Jobs, rows: Tensor) -> Tensor:
        """Adds what computes it and finds the column of each row's largest result, see engine/largest.py: (num_rows,)
        int64, once the jobs have run. For a layer without a bias."""


# Makes a layer of a weight (out, in) and a bias (out,) or none. Every linear layer of a model is made by one factory,
# the head too; it may keep the weight in another form, so a weight that is also used otherwise (a tied embedding)
# stays with the model.
LinearFactory = Callable[[Tensor, Tensor | None], Linear]


class DenseLinear:
    """A layer by torch in the dtype of its weight, on any device: exact, and what the others are held to."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight = weight  # (out, in)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """See Linear."""
        return F.linear(rows, self._weight, self._bias)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class LinearMaker:
    """A factory, the name of the form that its layers give to weights (empty if they keep them as they are), and who
    computes them."""

    make: LinearFactory
    form: str = ""
    team: Team | None = None  # whose layers these are; None: they are no TeamLinear
    # Makes a layer that computes with the weight as it is, whatever the form.
    make_exact: LinearFactory = DenseLinear
    # Makes a layer of a weight that the checkpoint has in blocks. None: they are read as other weights are.
    make_packed: Callable[[Blocks, Tensor | None], Linear] | None = None
    settle: Callable[[], None] = _nothing  # to be called when all layers of a model are made: tries what is fastest


DENSE = LinearMaker(DenseLinear)
