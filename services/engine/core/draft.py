"""A step's plan while it is being made."""

from __future__ import annotations

from services.engine.core.plan import PageCopy, Segment, StepPlan
from services.engine.core.sequence import Sequence


class Draft:
    """Collects segments under a token budget; a sequence that is preempted meanwhile is taken out again."""

    def __init__(self, budget: int, *, is_ahead: bool = False) -> None:
        self.budget = budget  # tokens that the step may still take
        self.is_ahead = is_ahead  # the step before is still under way
        self._segments: dict[int, Segment] = {}
        self._copies: dict[int, list[PageCopy]] = {}
        self._pinned: list[int] = []
        self._admitted: list[int] = []
        self._preempted: list[int] = []
        self._refused: list[int] = []

    def end_for(self, sequence: Sequence, page_size: int) -> int:
        """How far the budget lets a sequence get. Pieces of a prompt end at a page's end where they can."""
        end = sequence.num_planned + min(sequence.num_left, self.budget)
        aligned = end // page_size * page_size
        return aligned if end < sequence.goal and aligned > sequence.num_planned else end

    def add(self, sequence: Sequence, end: int) -> None:
        """Puts positions [num_planned, end) into the step; the pages are there."""
        begin, sample = sequence.num_planned, sequence.sample_spec(end)
        num_pages = -(-end // sequence.chain.page_size)
        self.budget -= end - begin
        self._segments[sequence.number] = Segment(
            sequence.number,
            begin,
            sequence.tokens[begin:end],
            sequence.pages[:num_pages],
            sample,
            sequence.score_spec(begin, end),
            follows=begin == len(sequence.tokens),
            num_single=max(0, end - max(begin, sequence.num_prompt - 1)),
        )
        sequence.num_planned = end
        if sample is not None:
            sequence.expect()

    def copy(self, sequence: Sequence, source: int, target: int) -> None:
        """Has `source` copied into the sequence's `target` first. The source stays retained until then."""
        self._copies.setdefault(sequence.number, []).append(PageCopy(source, target))
        self._pinned.append(source)

    def admit(self, sequence: Sequence) -> None:
        """The sequence has been given a place."""
        self._admitted.append(sequence.number)

    def preempt(self, sequence: Sequence) -> None:
        """The sequence's pages are gone, so it and its copies leave the step."""
        segment = self._segments.pop(sequence.number, None)
        if segment is not None:
            self.budget += segment.num_tokens
            if segment.sample is not None:
                sequence.expect_no_more()
        self._copies.pop(sequence.number, None)
        self._preempted.append(sequence.number)

    def refuse(self, sequence: Sequence) -> None:
        """The send finds too few pages."""
        self._refused.append(sequence.number)

    def plan(self) -> StepPlan:
        """The finished plan."""
        return StepPlan(
            segments=tuple(self._segments.values()),
            copies=tuple(copy for copies in self._copies.values() for copy in copies),
            pinned=tuple(self._pinned),
            admitted=tuple(number for number in self._admitted if number not in self._preempted),
            preempted=tuple(self._preempted),
            refused=tuple(self._refused),
        )
