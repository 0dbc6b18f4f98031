"""A model whose next token is a digest of all KV that it reads back from the pages: one wrong page changes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from services.engine.core.plan import Chosen, Computed, Launched, PageCopy, SampleSpec, Segment, StepPlan
from services.engine.sampling.params import SamplingParams
from services.engine.sampling.prompt_logprobs import PromptLogprobs

POISON = -1


def kv_of(tokens: Sequence[int], num_layers: int) -> NDArray[np.int64]:
    """KV of every token at its position, (layers, tokens)."""
    positions = np.arange(len(tokens))
    rows = np.asarray(tokens, dtype=np.int64) * 1_000_003 + positions * 101
    return rows[None, :] * 8 + np.arange(num_layers)[:, None]


def choose(kv: NDArray[np.int64], params: SamplingParams, vocab: int) -> int:
    """The next token: a digest of KV (layers, tokens), and of seed and position where one samples."""
    salt = b"" if params.is_greedy else f"{params.seed} {kv.shape[1]}".encode()
    return crc32(np.ascontiguousarray(kv).tobytes() + salt) % vocab


def score(kv: NDArray[np.int64], target: int) -> float:
    """What stands for a log-probability of `target` after KV (layers, tokens): exact in float32."""
    return -float(crc32(np.ascontiguousarray(kv).tobytes() + b"%d" % target) % 10_000)


def expected_scores(prompt: Sequence[int], num_layers: int = 3) -> list[float]:
    """Of all tokens of a prompt but the first."""
    kv = kv_of(prompt, num_layers)
    return [score(kv[:, :position], target) for position, target in enumerate(prompt[1:], start=1)]


def expected_tokens(
    prompt: Sequence[int], count: int, params: SamplingParams, vocab: int, num_layers: int = 3
) -> list[int]:
    """What an engine that makes no mistake generates."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(choose(kv_of(tokens, num_layers), params, vocab))
    return tokens[len(prompt) :]


@dataclass(frozen=True, slots=True)
class LateStep:
    runner: FakeRunner
    plan: StepPlan
    on_layer: Callable[[int], None] | None

    def wait(self) -> Computed:
        return self.runner.finish(self)


class FakeRunner:
    """See Runner. `memory` is (layers, pages, page_size).

    With a lag, a step is computed as late as it may be, when it is waited for: all that was planned meanwhile has
    happened. Nothing shows before that, as if a device computed it.
    """

    def __init__(self, num_pages: int, page_size: int, vocab: int, num_layers: int = 3, lag: int = 0) -> None:
        self.lag = lag
        self._late: list[LateStep] = []
        self._newest: dict[int, int] = {}  # the token that the newest step computed chose, by sequence
        self.memory = np.full((num_layers, num_pages, page_size), POISON, dtype=np.int64)
        self.vocab = vocab
        self.page_size = page_size
        self.num_tokens_computed = 0
        self.plans: list[StepPlan] = []
        self.fail_next: Exception | None = None

    def launch(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Launched:
        self.plans.append(plan)
        if not self.lag:
            return self.run(plan, on_layer)
        specs = [s.sample and (s.sample.position, s.sample.num_awaited) for s in plan.segments]
        assert all(spec is None or spec[0] == s.end for s, spec in zip(plan.segments, specs, strict=True))
        self._late.append(LateStep(self, plan, on_layer))
        assert len(self._late) <= 1 + self.lag
        return self._late[-1]

    def finish(self, step: LateStep) -> Computed:
        """Computes a step; those before it have been."""
        assert self._late.pop(0) is step
        return self.run(step.plan, step.on_layer)

    def run(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Computed:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            self._newest = defaultdict(int)  # what follows a step that failed computes anything
            raise error
        self._copy(plan.copies)
        self.num_tokens_computed += plan.num_tokens
        for layer in range(len(self.memory)):
            for segment in plan.segments:
                tokens = [self._newest[segment.number]] if segment.follows else segment.token_ids
                for position, token in enumerate(tokens, start=segment.begin):
                    page = segment.page_ids[position // self.page_size]
                    value = (token * 1_000_003 + position * 101) * 8 + layer
                    self.memory[layer, page, position % self.page_size] = value
            if on_layer is not None:
                on_layer(layer)
        wanted = [(s.number, self._choose(s.page_ids, s.end, s.sample)) for s in plan.segments if s.sample is not None]
        self._newest = {number: chosen.token_id for number, chosen in wanted}
        rated = [self._rate(s) for s in plan.segments if s.score is not None]
        return Computed([chosen for _, chosen in wanted], rated)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        self._copy(copies)

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        for copy in copies:
            self.memory[:, copy.target] = self.memory[:, copy.source]

    def poison(self, pages: Sequence[int]) -> None:
        self.memory[:, list(pages)] = POISON

    def read(self, pages: Sequence[int], length: int) -> NDArray[np.int64]:
        """KV of the first `length` tokens in the pages, (layers, length)."""
        return self.memory[:, list(pages)].reshape(len(self.memory), -1)[:, :length]

    def _rate(self, segment: Segment) -> PromptLogprobs:
        """A digest of all KV before each target, and of the target; the alternatives are the target's successors."""
        spec = segment.score
        assert spec is not None
        assert spec.first >= 0
        rated = []
        for row, target in enumerate(spec.targets, start=segment.begin + spec.first):
            assert row < segment.end
            rated.append(score(self.read(segment.page_ids, row + 1), target))
        own = np.array(rated, dtype=np.float32)
        tops = np.arange(1, spec.num_top + 1)
        ids = (np.array(spec.targets, dtype=np.int32)[:, None] + tops) % self.vocab
        return PromptLogprobs(own, ids.astype(np.int32), own[:, None] - tops.astype(np.float32))

    def _choose(self, pages: Sequence[int], end: int, spec: SampleSpec) -> Chosen:
        token = choose(self.read(pages, end), spec.params, self.vocab)
        if spec.forced_token_id is not None:
            token = spec.forced_token_id
        logprob = None if spec.params.logprobs is None else -1.0
        return Chosen(token, logprob, ((token, -1.0),) * (spec.params.logprobs or 0))
