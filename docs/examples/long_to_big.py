"""Long prompts go to engines labelled size=big, the rest to the others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Params:
    long: int = 1000  # tokens


async def policy(request, fleet, params):
    want_big = len(request.prompt) >= params.long
    suitable = [engine for engine in fleet.engines if (engine.info.labels.get("size") == "big") == want_big]
    engine = min(suitable or fleet.engines, key=lambda engine: engine.snapshot.sequences)
    yield engine.start_generate(request)
