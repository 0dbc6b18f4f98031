"""Refuses prompts that would cost too much."""

from dataclasses import dataclass

from services.router.policies import Refused


@dataclass(frozen=True)
class Params:
    tokens: int = 2000


async def policy(request, fleet, params):
    num_tokens = len(request.prompt) - request.num_generated
    if num_tokens > params.tokens:
        raise Refused(f"prompts over {params.tokens} tokens are not served here; this one has {num_tokens}")
    yield fleet.least_loaded(request).start_generate(request)
