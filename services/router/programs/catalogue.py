"""The programs at hand and the one in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.router.errors import NoEarlierPolicy
from services.router.programs.library import Library
from services.router.programs.program import POLICY, BoundProgram, Program
from services.router.programs.split import Split
from services.router.traces import Trace

BUILT_IN = Path(__file__).parent.parent / "policies"
FALLBACK = "data_parallel"
MAX_PAST = 16


@dataclass(slots=True)
class _Use:
    """A program while it is, or was, the current one."""

    program: BoundProgram
    answered: bool = False  # whether a request on it has ended well


class Catalogue(Library):
    """Policies by name. A request takes a bound program out once, so changes here never reach one under way."""

    def __init__(self, files: Iterable[Path] = (), use: str = FALLBACK) -> None:
        """Loads the built-in programs and `files`; `use` is a name with parameters, or one more file. BadPolicy."""
        super().__init__(POLICY, BUILT_IN, files)
        self._past: deque[_Use] = deque(maxlen=MAX_PAST)
        self._use = _Use(self.take_in(use))
        self._split: Split | None = None

    @property
    def current(self) -> BoundProgram:
        """What requests that name no policy run, but for the shares of a split."""
        return self._use.program

    @property
    def split(self) -> Split | None:
        """How requests that name no policy are shared out, or were last."""
        return self._split

    @property
    def fallback(self) -> BoundProgram:
        """What runs where a program finds no two engines: data parallel."""
        return self._programs[FALLBACK].bind("")

    def get(self, name: str) -> Program:
        """The program of that name, the current one for an empty name. UnknownPolicy."""
        return super().get(name) if name else self.current.program

    def resolve(self, spec: str) -> BoundProgram:
        """The program for a request: as named, else by the split, else the current one. UnknownPolicy, BadPolicy."""
        if spec:
            return self.bind(spec)
        if self._split is not None and not self._split.ended:
            return self._split.pick()
        return self._use.program

    def use(self, spec: str) -> BoundProgram:
        """Makes it the current one, at once and for requests that begin from now on; a split ends. UnknownPolicy,
        BadPolicy."""
        program = self.bind(spec)
        self._past.append(self._use)
        self._use = _Use(program)
        self.end_split()
        return program

    def roll_back(self) -> BoundProgram:
        """Makes the last good one current again, with the code it had: the latest before the current one that has
        answered a request, else the oldest known. A split ends. NoEarlierPolicy."""
        if not self._past:
            raise NoEarlierPolicy(f"no policy was in use before {self.current.spec}")
        good = [use for use in self._past if use.answered]
        restored = good[-1] if good else self._past[0]
        while self._past.pop() is not restored:
            pass
        self._use = restored
        self._programs[restored.program.name] = restored.program.program
        self.end_split()
        return restored.program

    def begin_split(self, shares: Sequence[tuple[str, float]]) -> Split:
        """Shares out the requests that name no policy: (program, percent) each, the rest to the current one.
        UnknownPolicy, BadPolicy."""
        self._split = Split(self.current, [(self.bind(spec), percent) for spec, percent in shares])
        return self._split

    def end_split(self) -> None:
        """From now on all go to the current one; the results stay to be read."""
        if self._split is not None:
            self._split.ended = True

    def ended(self, program: BoundProgram, trace: Trace) -> None:
        """A request that `program` was to serve has ended."""
        if self._split is not None:
            self._split.add(program, trace)
        if trace.code == "OK":
            for use in (self._use, *self._past):
                use.answered = use.answered or use.program is program
