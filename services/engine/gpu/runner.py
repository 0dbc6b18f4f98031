"""Steps on a GPU: queued without waiting, so that the next one is planned while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.core.plan import Computed, Launched, RunnerBroken, StepPlan
from services.engine.core.runner import TorchRunner, scored_rows
from services.engine.gpu.choosing import Choices, Chooser
from services.engine.gpu.graphs import DecodeGraphs
from services.engine.gpu.inputs import StepInputs
from services.engine.gpu.marks import LayerMarks, Mark, finish, mark_on
from services.engine.gpu.packing import Packer
from services.engine.model.model import Model
from services.engine.sampling.score import PromptScorer, rows_at_once


class QueuedRunner(TorchRunner):
    """Computes what TorchRunner computes; the tokens of a step stay on the device for the one that follows it.

    It runs on the CPU too, where nothing is queued: so tests hold it equal.
    """

    lag = 1

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        kv: Tensor,
        eos_token_ids: Collection[int] = (),
        graphs: DecodeGraphs | None = None,
        new_mark: Callable[[torch.device], Mark] = mark_on,
    ) -> None:
        super().__init__(model, attention, kv, eos_token_ids)
        self._graphs = graphs
        self._new_mark = partial(new_mark, kv.device)
        self._rows_before: dict[int, int] = {}
        self._chosen_before = torch.zeros(1, dtype=torch.int64, device=kv.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        """See Runner."""
        with ending_with(self._kv.device):
            return self._queue(plan, on_layer)

    def _queue(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        self._copy(plan.copies)
        packer = Packer()
        num_rows = self._graphs.bucket(plan) if self._graphs is not None and on_layer is None else 0
        inputs = StepInputs(packer, plan.segments, self._kv.shape[4], self._rows_before, num_rows)
        specs = [segment.sample for segment in plan.segments if segment.sample is not None]
        chooser = Chooser(packer, specs, self._eos_token_ids)
        wanted = [segment.score for segment in plan.segments if segment.score is not None]
        scorer = PromptScorer([each.targets for each in wanted], [each.num_top for each in wanted])
        packed = packer.send(self._kv.device)
        batch = inputs.batch(packed, self._chosen_before)
        layers = LayerMarks(on_layer, self._new_mark) if on_layer is not None else None
        if num_rows:
            assert self._graphs is not None
            logits: Tensor | None = self._graphs.replay(batch)[batch.logits_rows]
        else:
            when_queued = layers.queued if layers is not None else None
            hidden = self._model.forward(batch, self._attention, when_queued)  # (num_tokens, hidden)
            if wanted:
                for rows in torch.split(scored_rows(plan.segments), rows_at_once(self._model.config.vocab_size)):
                    scorer.rate(self._model.logits(hidden[rows.to(hidden.device)]))
            logits = self._model.logits(hidden[batch.logits_rows]) if specs else None
        if logits is None:
            self._rows_before = {}
            return _Queued(self._kv.device, chooser, None, scorer if wanted else None, layers, self._mark())
        choices = chooser.choose(packed, logits, batch.token_ids[batch.logits_rows])
        sampled = (segment.number for segment in plan.segments if segment.sample is not None)
        self._rows_before = {number: row for row, number in enumerate(sampled)}
        self._chosen_before = choices.tokens
        scored = scorer if wanted else None
        return _Queued(self._kv.device, chooser, _to_host(choices), scored, layers, self._mark())

    def _mark(self) -> Mark:
        """The end of a step."""
        return self._new_mark()


@dataclass(frozen=True, slots=True)
class _Queued:
    device: torch.device
    chooser: Chooser
    choices: Choices | None  # None: the step chooses nothing
    scorer: PromptScorer | None
    layers: LayerMarks | None  # None: nobody wants to hear of layers
    over: Mark

    def wait(self) -> Computed:
        """See Launched."""
        with ending_with(self.device):
            if self.layers is not None:
                self.layers.finish()
            self.over.synchronize()
        chosen = self.chooser.result(self.choices) if self.choices is not None else ()
        return Computed(chosen, self.scorer.results() if self.scorer is not None else ())


@contextmanager
def ending_with(device: torch.device, probe: Callable[[torch.device], None] = finish) -> Iterator[None]:
    """What goes wrong inside becomes RunnerBroken if the device cannot be used afterwards, as `probe` finds out.

    After an illegal access, for one, every later call in the process fails; memory that ran out is no such thing.
    """
    try:
        yield
    except Exception as error:
        try:
            probe(device)
        except Exception:
            raise RunnerBroken(f"{device} computes nothing any more: {error}") from error
        raise


def _to_host(choices: Choices) -> Choices:
    """Queues copies into pinned memory; elsewhere a copy, which no later step changes."""
    return Choices(*(_copied(each) for each in (choices.tokens, choices.logprobs, choices.top_ids)))


def _copied(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
