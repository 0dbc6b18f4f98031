"""How a sequence goes on that was taken off an engine which is to be emptied."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import replace

from services.protocol.errors import ServiceError
from services.router.fleet.generation import Generation
from services.router.fleet.view import Engine, Fleet
from services.router.programs.program import BoundProgram
from services.router.request import PolicyRequest

log = logging.getLogger(__name__)


def moving(program: BoundProgram, source: str) -> BoundProgram:
    """In place of `program`: the context moves from the engine at `source` to the least loaded one, which goes on. Like
    any context it is computed anew where it cannot be moved."""

    async def policy(request: PolicyRequest, fleet: Fleet) -> AsyncGenerator[Generation, None]:
        target = fleet.least_loaded(request)
        try:
            await _move(request, fleet.leaving(source), target)
        except ServiceError as error:
            fields = {"request": request.request_id, "reason": error.reason}
            log.info("a context is computed anew instead of moved", extra={"fields": fields})
        yield target.start_generate(request)

    return replace(program, program=replace(program.program, function=policy), arguments=())


async def _move(request: PolicyRequest, source: Engine, target: Engine) -> None:
    end = target.page_floor(len(request.prompt) - 1)
    async with target.prep_recv(request, end=end) as kv:
        await source.remote_send(request, kv)
        await kv.release(publish=True)
