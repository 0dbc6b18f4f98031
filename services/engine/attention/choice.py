"""The choice of an attention backend at the start: a self-test against the oracle, then, on a GPU, a trial of speed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend, BackendUnavailable
from services.engine.attention.problem import Problem, WrongResult

Factory = Callable[[Tensor, int], AttentionBackend]
WORTH_IT = 1.2  # how much faster one must be than those before it: less is noise

_log = logging.getLogger(__name__)


class AttentionFailed(ValueError):
    """A backend failed that is not to be replaced. The message is one phrase that says which and why."""


@torch.inference_mode()
def choose(
    candidates: Mapping[str, Factory],
    kv: Tensor,
    num_heads: int,
    num_threads: int,
    dtype: torch.dtype,
    *,
    by_speed: bool,
) -> AttentionBackend:
    """The first of `candidates` that computes right over the pool `kv`, or with `by_speed` a later one that is clearly
    faster: then a busy moment may decide what numbers an engine computes, for backends differ in their last bits.

    Queries come in `dtype`.

    Each is skipped, with a log line, if it cannot be had or does not compute what the oracle does. So is, with
    `by_speed`, one that fails; else the failure is raised, as AttentionFailed: it may be the machine's, of that moment,
    and must not decide what numbers an engine computes either. Raises BackendUnavailable if none is left.
    """
    problem = Problem(kv, num_heads, dtype)
    sound: dict[str, AttentionBackend] = {}
    for name, make in candidates.items():
        try:
            backend = make(problem.kv, num_threads)
            problem.check(backend)
        except BackendUnavailable as error:
            _log.info("an attention backend cannot be used", extra={"fields": {"backend": name, "why": str(error)}})
        except Exception as error:  # whatever a library does
            why = f"{type(error).__name__}: {error}"
            if not (by_speed or isinstance(error, WrongResult)):
                raise AttentionFailed(f"{name} cannot be tried ({why})") from error
            _log.warning("an attention backend is broken", extra={"fields": {"backend": name, "why": why}})
        else:
            sound[name] = backend
            if not by_speed:
                break
    if not sound:
        raise BackendUnavailable(f"none of {', '.join(candidates)} computes attention over this pool")
    seconds = problem.seconds(sound) if len(sound) > 1 else {}
    name = _best(list(sound), seconds)
    fields = {"backend": name, "why": "fastest of those that are right" if seconds else "the first that is right"}
    times = {f"{each}_ms": round(1000 * value, 3) for each, value in seconds.items()}
    _log.info("attention backend chosen", extra={"fields": {**fields, **times}})
    return candidates[name](kv, num_threads)


def _best(names: list[str], seconds: Mapping[str, float]) -> str:
    best = names[0]
    for name in names[1:]:
        if seconds[name] * WORTH_IT < seconds[best]:
            best = name
    return best
