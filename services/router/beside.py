"""Running a request where another one left its prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

from services.router.asking import Beside
from services.router.fleet.generation import Generation, Yielded
from services.router.fleet.view import Fleet
from services.router.programs.program import BoundProgram
from services.router.request import PolicyRequest


def beside(other: Beside) -> BoundProgram:
    """The program of the other answer, but on its engine while that takes work: the prompt's pages are there. It is not
    the same program as the other's, and so counts for no share of the traffic by itself."""
    program, engine = other.program, other.engine

    def policy(request: PolicyRequest, fleet: Fleet) -> AsyncGenerator[Yielded, None]:
        there = [each for each in fleet.engines if each.info.name == engine]
        return _whole(there[0].start_generate(request)) if there else program.start(request, fleet)

    return replace(program, program=replace(program.program, function=policy), arguments=())


async def _whole(generation: Generation) -> AsyncGenerator[Yielded, None]:
    yield generation
