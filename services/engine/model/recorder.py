"""Forward passes on the CPU as recordings: what Python says of a step is said once for each number of tokens.

A decoding step of so many sequences is the same jobs over the same memory every time. It is recorded when it first
occurs; then one call of compiled code computes it, without Python between its few hundred jobs. A step with pieces of
prompts is recorded anew each time: that is little beside computing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.kernels.facts import POSITIONS, SLOTS, TOKEN_IDS
from services.engine.kernels.jobs import Jobs, Memory
from services.engine.kernels.team import Team, address
from services.engine.model.config import ModelConfig
from services.engine.model.ops import Ops, Step
from services.engine.model.team_ops import TeamOps


@dataclass(frozen=True, slots=True)
class _Recording:
    jobs: Jobs
    result: Tensor


class Recorder:
    """Computes steps of one decoder whose linear layers are those of `team`. One thread at a time."""

    def __init__(self, config: ModelConfig, team: Team) -> None:
        self._config = config
        self._team = team
        self._memory = Memory()
        self._attention: PagedNumbaAttention | None = None
        self._decoding: dict[int, _Recording] = {}  # by number of tokens, over the pool of `attention`

    def takes(self, step: Step) -> bool:
        """Whether a step can be recorded: its attention must be jobs too."""
        return isinstance(step.attention, PagedNumbaAttention) and step.attention.fits

    def compute_step(self, compute: Callable[[Ops, Step], Tensor], step: Step) -> Tensor:
        """What compute(ops, step) returns, with its values. `compute` must do nothing else than call operations."""
        attention, batch = step.attention, step.batch
        assert isinstance(attention, PagedNumbaAttention)
        if attention is not self._attention:
            self._attention, self._decoding = attention, {}
        rows = attention.rows_of(batch, self._config.num_heads)
        recording = self._decoding.get(batch.num_tokens) if rows.is_decoding else None
        if recording is None:
            recording = self._record(compute, step)
            if rows.is_decoding:
                self._decoding[batch.num_tokens] = recording
        facts = recording.jobs.facts
        rows.put(facts)
        facts[TOKEN_IDS], facts[POSITIONS] = address(batch.token_ids), address(batch.positions)
        facts[SLOTS] = address(batch.slots)
        recording.jobs.run(step.on_layer)
        return recording.result.clone() if rows.is_decoding else recording.result

    def compute(self, compute: Callable[[Ops], Tensor]) -> Tensor:
        """What compute(ops) returns, with its values, without a step."""
        jobs = Jobs(self._team)
        result = compute(TeamOps(self._config, jobs))
        jobs.run()
        return result

    def _record(self, compute: Callable[[Ops, Step], Tensor], step: Step) -> _Recording:
        jobs = Jobs(self._team, self._memory)
        return _Recording(jobs, compute(TeamOps(self._config, jobs), step))
