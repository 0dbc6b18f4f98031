"""Choosing engines: pure functions of a request and of what is known of the engines at one moment.

Engines have no roles of their own. Where a pattern wants two kinds, `roles` says which engine is which: by the label
role=prefill or role=decode given to engines at start, else the first half by name prefills and the rest decodes, so
that the same fleet is always split the same way.

This looks at every engine. roster.py gives the same answers for fleets of many.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.router.errors import NoEngine, NoPair
from services.router.fleet.info import EngineSnapshot
from services.router.request import PolicyRequest

Engines = Sequence[EngineSnapshot]
ROLE, PREFILL, DECODE = "role", "prefill", "decode"


def least_loaded(engines: Engines) -> EngineSnapshot:
    """The engine with the fewest sequences for its size, then with the fewest prompt tokens to compute. NoEngine."""
    if not engines:
        raise NoEngine("no healthy engine serves this model", retry_delay_s=1.0)
    return min(engines, key=_decode_load)


def pair(engines: Engines) -> tuple[EngineSnapshot, EngineSnapshot]:
    """(prefill, decode): the fewest prompt tokens to compute, the fewest sequences. NoPair."""
    prefill, decode = roles(engines)
    return min(prefill, key=_prefill_load), min(decode, key=_decode_load)


def pair_by_prefix(request: PolicyRequest, engines: Engines) -> tuple[EngineSnapshot, EngineSnapshot]:
    """(prefill, decode): of each role the engine that has most of the prompt cached; load decides between equals."""
    prefill, decode = roles(engines)
    return (
        min(prefill, key=lambda engine: (-engine.cached_prefix(request), _prefill_load(engine))),
        min(decode, key=lambda engine: (-engine.cached_prefix(request), _decode_load(engine))),
    )


def roles(engines: Engines) -> tuple[list[EngineSnapshot], list[EngineSnapshot]]:
    """Those that prefill and those that decode: disjoint, neither empty. NoPair says why there are none."""
    able = sorted((engine for engine in engines if engine.info.can_transfer), key=name)
    if len(able) < 2:
        alone = len(engines) < 2
        raise NoPair(
            "fewer than two engines are healthy" if alone else "fewer than two engines have a KV transfer service",
            cause="ONE_ENGINE" if alone else "NO_KVTRANSFER",
        )
    prefill = [engine for engine in able if engine.info.labels.get(ROLE) == PREFILL]
    decode = [engine for engine in able if engine.info.labels.get(ROLE) == DECODE]
    if prefill and decode:
        return prefill, decode
    return able[: len(able) // 2], able[len(able) // 2 :]


def name(engine: EngineSnapshot) -> tuple[str, str]:
    """What tells equal engines apart."""
    return engine.info.name, engine.address


def relative_sequences(engine: EngineSnapshot) -> float:
    """Sequences for its size."""
    return engine.sequences / max(1, engine.info.max_batch_size)


def _prefill_load(engine: EngineSnapshot) -> tuple[int, str, str]:
    return engine.prompt_tokens, *name(engine)


def _decode_load(engine: EngineSnapshot) -> tuple[float, int, str, str]:
    return relative_sequences(engine), engine.prompt_tokens, *name(engine)
