"""A program that has been loaded, and one with its parameters filled in."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from services.router.errors import BadPolicy
from services.router.fleet.generation import Yielded
from services.router.fleet.view import Fleet
from services.router.programs.params import ParamsSpec
from services.router.request import PolicyRequest


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file must define to be a program of a kind."""

    function: str  # its name, and that of the kind
    parameters: tuple[str, ...]
    fits: Callable[[Any], bool]
    wanted: str  # the same in words


POLICY = Kind(
    "policy", ("request", "fleet"), inspect.isasyncgenfunction, "`async def policy(request, fleet)` that yields"
)


PLANNER = Kind("planner", ("fleet",), inspect.iscoroutinefunction, "`async def planner(fleet)` without a yield")


@dataclass(frozen=True, slots=True)
class Program:
    """Source, and what running it defined. `params` is None if it takes none."""

    name: str
    summary: str
    source: str
    file: str  # empty if it was uploaded
    function: Callable[..., Any]
    params: ParamsSpec | None
    kind: Kind

    def bind(self, text: str) -> BoundProgram:
        """With parameters, as in "0.5" or "ratio=0.5,little=64"; empty for the defaults. BadPolicy."""
        if self.params is None:
            if text:
                raise BadPolicy(f"{self.kind.function} {self.name} takes no parameters")
            return BoundProgram(self, self.name, ())
        try:
            return BoundProgram(self, f"{self.name}:{text}" if text else self.name, (self.params.parse(text),))
        except Exception as error:  # checks of the program's own may raise anything
            raise BadPolicy(f"{self.kind.function} {self.name}: {error}") from None


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """A program ready to run. It stays what it is when the catalogue changes, so requests end on what they began."""

    program: Program
    spec: str  # the name, and the parameters as given after a colon
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The program's name, without parameters."""
        return self.program.name

    def start(self, request: PolicyRequest, fleet: Fleet) -> AsyncGenerator[Yielded, None]:
        """What a policy yields; nothing runs before the first is asked for."""
        steps: AsyncGenerator[Yielded, None] = self.program.function(request, fleet, *self.arguments)
        return steps
