"""Running a request where another one left its prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from services.router.fleet.view import Fleet
from services.router.programs.program import BoundProgram
from services.router.request import PolicyRequest
from services.router.values import Chunk


def beside(program: BoundProgram, engine: str) -> BoundProgram:
    """`program`, but on the engine of that name while it takes work: the prompt's pages are there."""

    async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncGenerator[Chunk, None]:
        there = [each for each in fleet.engines if each.info.name == engine]
        chunks = there[0].start_generate(request) if there else program.start(request, fleet)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk

    return replace(program, program=replace(program.program, function=policy), arguments=())
