"""The programs at hand and the one in use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.router.errors import BadPolicy, UnknownPolicy
from services.router.programs.loader import load_file
from services.router.programs.program import BoundProgram, Program

BUILT_IN = Path(__file__).parent.parent / "policies"
FALLBACK = "data_parallel"
MAX_UPLOADED = 64


def built_in_programs() -> list[Program]:
    """Those that come with the router."""
    return [load_file(path) for path in sorted(BUILT_IN.glob("*.py")) if path.stem != "__init__"]


class Catalogue:
    """Programs by name. A request takes a bound program out once, so changes here never reach one under way."""

    def __init__(self, files: Iterable[Path] = (), use: str = FALLBACK) -> None:
        """Loads the built-in programs and `files`; `use` is a name with parameters, or one more file. BadPolicy."""
        self._programs = {program.name: program for program in built_in_programs()}
        self._built_in = frozenset(self._programs)
        for path in files:
            self.add(load_file(path))
        if use.endswith(".py"):
            program = load_file(Path(use))
            self.add(program)
            use = program.name
        self._current = self.resolve(use)

    @property
    def current(self) -> BoundProgram:
        """What requests that name no policy run."""
        return self._current

    @property
    def fallback(self) -> BoundProgram:
        """What runs where a program finds no two engines: data parallel."""
        return self._programs[FALLBACK].bind("")

    def programs(self) -> list[Program]:
        """All, by name."""
        return sorted(self._programs.values(), key=lambda program: program.name)

    def get(self, name: str) -> Program:
        """The program of that name, the current one for an empty name. UnknownPolicy."""
        if not name:
            return self._current.program
        program = self._programs.get(name)
        if program is None:
            raise UnknownPolicy(f"there is no policy named {name[:100]!r}")
        return program

    def resolve(self, spec: str) -> BoundProgram:
        """The program for "name" or "name:parameters", the current one for "". UnknownPolicy, BadPolicy."""
        if not spec:
            return self._current
        name, _, text = spec.partition(":")
        return self.get(name).bind(text)

    def use(self, spec: str) -> BoundProgram:
        """Makes it the current one, at once and for requests that begin from now on. UnknownPolicy, BadPolicy."""
        self._current = self.resolve(spec)
        return self._current

    def add(self, program: Program) -> None:
        """Takes a program in, in place of an earlier one of that name. BadPolicy for names of built-in ones."""
        if program.name in self._built_in:
            raise BadPolicy(f"{program.name} is built in: choose another name")
        uploaded = sum(not each.file for each in self._programs.values())
        if program.name not in self._programs and not program.file and uploaded >= MAX_UPLOADED:
            raise BadPolicy(f"{MAX_UPLOADED} uploaded policies are kept: replace one of them")
        self._programs[program.name] = program
