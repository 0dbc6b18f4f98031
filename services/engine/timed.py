"""A runner and a model that count the time they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.batch import ForwardBatch
from services.engine.core.plan import Computed, Launched, PageCopy, Runner, StepPlan
from services.engine.metrics import MODEL_SECONDS, STEP_SECONDS
from services.engine.model.model import Model


class TimedRunner:
    """A runner whose steps are timed, each from its launch or the end of the one before to its own end."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._free_since = 0.0

    @property
    def lag(self) -> int:
        """See Runner."""
        return self._runner.lag

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        """See Runner."""
        began = time.perf_counter()
        return _TimedStep(self, self._runner.launch(plan, on_layer), began)

    def ended(self, began: float) -> None:
        """A step that was launched at `began` is over."""
        now = time.perf_counter()
        STEP_SECONDS.observe(now - max(began, self._free_since))
        self._free_since = now

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """See Runner."""
        self._runner.copy_pages(copies)

    def poison(self, pages: Sequence[int]) -> None:
        """See Runner."""
        self._runner.poison(pages)


@dataclass(frozen=True, slots=True)
class _TimedStep:
    runner: TimedRunner
    launched: Launched
    began: float

    def wait(self) -> Computed:
        """See Launched."""
        computed = self.launched.wait()
        self.runner.ended(self.began)
        return computed


class TimedModel:
    """A model whose time is counted; on a GPU, the time to queue its work."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(
        self, batch: ForwardBatch, attention: AttentionBackend, on_layer: Callable[[int], None] | None = None
    ) -> Tensor:
        """See Model."""
        with _counted():
            return self._model.forward(batch, attention, on_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        """See Model."""
        with _counted():
            return self._model.logits(hidden)

    def largest(self, hidden: Tensor) -> Tensor:
        """See Model."""
        with _counted():
            return self._model.largest(hidden)


@contextmanager
def _counted() -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        MODEL_SECONDS.inc(time.perf_counter() - began)
