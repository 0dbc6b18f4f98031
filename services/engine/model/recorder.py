"""Forward passes on the CPU as recordings: what Python says of a step is said once for each number of tokens.

A decoding step of so many sequences is the same jobs over the same memory every time. It is recorded when it first
occurs; then one call of compiled code computes it, without Python between its few hundred jobs. A step with pieces of
prompts is recorded anew each time: that is little beside computing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.kernels.facts import POSITIONS, SLOTS, TOKEN_IDS
from services.engine.kernels.jobs import Jobs, Memory
from services.engine.kernels.team import Team, address
from services.engine.model.config import ModelConfig
from services.engine.model.ops import Ops, Step
from services.engine.model.team_ops import TeamOps

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Recording(Generic[_Result]):
    jobs: Jobs
    result: _Result


class Recorder:
    """Computes steps of one decoder whose linear layers are those of `team`. One thread at a time."""

    def __init__(self, config: ModelConfig, team: Team) -> None:
        self._config = config
        self._team = team
        self._memory = Memory()
        self._attention: PagedNumbaAttention | None = None
        self._decoding: dict[int, _Recording[Tensor]] = {}  # by number of tokens, over the pool of `attention`

    def takes(self, step: Step) -> bool:
        """Whether a step can be recorded: its attention must be jobs too."""
        return isinstance(step.attention, PagedNumbaAttention) and step.attention.fits

    def compute_step(self, compute: Callable[[Ops, Step], Tensor], step: Step) -> Tensor:
        """What compute(ops, step) returns, with its values. `compute` must do nothing else than call operations, and
        always the same."""
        attention, batch = step.attention, step.batch
        assert isinstance(attention, PagedNumbaAttention)
        if attention is not self._attention:
            self._attention, self._decoding = attention, {}
        if not attention.rows_of(batch, self._config.num_heads).is_decoding:
            return self.compute_once(compute, step)
        recording = self._decoding.get(batch.num_tokens)
        if recording is None:
            recording = self._decoding[batch.num_tokens] = self._record(compute, step)
        self._run(recording.jobs, step)
        return recording.result.clone()

    def compute_once(self, compute: Callable[[Ops, Step], _Result], step: Step) -> _Result:
        """The same of any operations, not to be used again. Of the result only what ops.embed gave outlives the next
        computation."""
        recording = self._record(compute, step)
        self._run(recording.jobs, step)
        return recording.result

    def compute(self, compute: Callable[[Ops], Tensor]) -> Tensor:
        """What compute(ops) returns, with its values, without a step."""
        jobs = Jobs(self._team)
        result = compute(TeamOps(self._config, jobs))
        jobs.run()
        return result

    def _run(self, jobs: Jobs, step: Step) -> None:
        attention, batch, facts = step.attention, step.batch, jobs.facts
        assert isinstance(attention, PagedNumbaAttention)
        rows = attention.rows_of(batch, self._config.num_heads)
        rows.put(facts)
        facts[TOKEN_IDS], facts[POSITIONS] = address(batch.token_ids), address(batch.positions)
        facts[SLOTS] = address(batch.slots)
        jobs.run(step.on_layer)

    def _record(self, compute: Callable[[Ops, Step], _Result], step: Step) -> _Recording[_Result]:
        jobs = Jobs(self._team, self._memory)
        return _Recording(jobs, compute(TeamOps(self._config, jobs), step))
