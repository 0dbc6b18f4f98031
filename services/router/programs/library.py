"""Programs of one kind, by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from services.router.errors import BadPolicy, UnknownPolicy
from services.router.programs.loader import load_file
from services.router.programs.program import BoundProgram, Kind, Program

MAX_UPLOADED = 64


def named_file(spec: str) -> tuple[Path, str] | None:
    """The path and the parameters in "FILE.py" or "FILE.py:parameters"; None for the name of a program."""
    path, has_params, params = spec.partition(".py:")
    if has_params:
        return Path(f"{path}.py"), params
    return (Path(spec), "") if spec.endswith(".py") else None


class Library:
    """Those that come with the router, those of files, and those that were uploaded."""

    def __init__(self, kind: Kind, built_in: Path, files: Iterable[Path] = ()) -> None:
        """`built_in`: the folder of those that come with the router. BadPolicy."""
        self.kind = kind
        paths = (path for path in sorted(built_in.glob("*.py")) if path.stem != "__init__")
        self._programs = {program.name: program for program in (load_file(path, kind) for path in paths)}
        self._built_in = frozenset(self._programs)
        for path in files:
            self.add(load_file(path, kind))

    def programs(self) -> list[Program]:
        """All, by name."""
        return sorted(self._programs.values(), key=lambda program: program.name)

    def get(self, name: str) -> Program:
        """The program of that name. UnknownPolicy."""
        program = self._programs.get(name)
        if program is None:
            raise UnknownPolicy(f"there is no {self.kind.function} named {name[:100]!r}")
        return program

    def bind(self, spec: str) -> BoundProgram:
        """The program for "name" or "name:parameters". UnknownPolicy, BadPolicy."""
        name, _, text = spec.partition(":")
        if not name:
            raise BadPolicy(f"name a {self.kind.function}")
        return self.get(name).bind(text)

    def take_in(self, spec: str) -> BoundProgram:
        """As bind, but in place of a name a file that is not at hand yet may stand. UnknownPolicy, BadPolicy."""
        named = named_file(spec)
        if named is None:
            return self.bind(spec)
        path, params = named
        program = load_file(path, self.kind)
        bound = program.bind(params)
        self.add(program)
        return bound

    def add(self, program: Program) -> None:
        """Takes a program in, in place of an earlier one of that name. BadPolicy for names of built-in ones."""
        if program.name in self._built_in:
            raise BadPolicy(f"{program.name} is built in: choose another name")
        uploaded = sum(not each.file for each in self._programs.values())
        if program.name not in self._programs and not program.file and uploaded >= MAX_UPLOADED:
            raise BadPolicy(f"{MAX_UPLOADED} uploaded ones are kept: replace one of them")
        self._programs[program.name] = program
