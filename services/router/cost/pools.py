"""How many of a model's engines had better compute prompts for the others, while its traffic stays as it is.

A request that is weighed by itself sees the sequences that run now, and none of the prompts that will come and hold its
own tokens up: where all engines do both, each placement looks like the next. So here whole divisions of labour are
compared, by what a request would take under each of them on average: waiting as in queues of type M/M/m, and tokens
that share their engine with prompts. (DistServe, Zhong et al., OSDI 2024, looks at prefill as a queue of type M/D/1.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

# What promises less is not worth a change: averages are hardly better than that.
_GAIN = 1.03
_NEARLY = 1.01  # as good as the best: then the smaller pool leaves more room for answers
_SPLITS = tuple(each / 10 for each in range(1, 11))  # shares of a prompt that are tried
_NUM_SIZES = 8  # sizes of the pool that are tried, in eighths of the fleet
_ROUNDS = 4  # in which how long an answer takes and how many there are agree well enough
# Of many engines the one that has the fewest sequences has so many fewer than all have on average: found with the
# simulated engines, 2 to 16 of them, under data_parallel.
_FEWER = 0.65
_FULL = 0.98  # share of an engine's time: more cannot be kept up
_CROWDED = 0.8  # of the sequences that it decodes at once: more on average have others wait


@dataclass(frozen=True, slots=True)
class Demand:
    """What engines that are alike have to do together. Times in seconds."""

    num_engines: int
    prefill: float  # engines that would do nothing but compute prompts
    tokens_per_s: float  # generated
    prompt_s: float  # computing one, on average
    output: float  # tokens of an answer
    step_s: float  # a decoding step with no sequence in it
    row_s: float  # what a sequence adds to it
    move_s: float  # a prompt's KV to another engine
    max_sequences: float = math.inf  # that one of them decodes at once


@dataclass(frozen=True, slots=True)
class Side:
    """One of a pool, on average."""

    share: float  # of its time that computing prompts takes
    held_up: float  # share of the time of its sequences in which they get no token for that
    num_behind: float  # prompts to come that each second of computing one holds up
    wait: float  # how long a prompt waits for its turn, over what computing one takes
    arrivals_per_s: float = 0.0  # of sequences whose prompts others have computed


@dataclass(frozen=True, slots=True)
class Pools:
    """A division of labour: `num_prefill` engines compute `split` of each prompt, and the others the rest and all
    answers. Without such engines each does everything."""

    num_prefill: int
    split: float
    prefill: Side
    decode: Side  # the others
    jct_s: float  # what a request takes on average


def best_pools(demand: Demand, num_prefill: int) -> Pools:
    """The one that is expected to be the quickest; with `num_prefill`, as it is now, unless that is clearly slower.
    Where none can keep up, all do everything."""
    options = {0: _pools(demand, 0, 0.0)}  # by the pool's size, the smallest first
    for size in _sizes(demand.num_engines, num_prefill):
        options[size] = min((_pools(demand, size, split) for split in _SPLITS), key=_jct_s)
    least_s = min(map(_jct_s, options.values()))
    kept = options.get(num_prefill)
    if kept is not None and kept.jct_s < _GAIN * least_s:
        return kept
    return next(each for each in options.values() if each.jct_s <= _NEARLY * least_s)


def _sizes(num_engines: int, now: int) -> Iterator[int]:
    sizes = {max(1, round(num_engines * eighths / _NUM_SIZES)) for eighths in range(1, _NUM_SIZES)}
    yield from sorted(size for size in sizes | {now} if 0 < size < num_engines)


def _jct_s(pools: Pools) -> float:
    return pools.jct_s


def _pools(demand: Demand, size: int, split: float) -> Pools:
    rest = demand.num_engines - size
    decode_s, decode = _decoding(demand, rest, (1 - split) * demand.prefill / rest)
    jct_s = demand.prompt_s + decode.wait * (1 - split) * demand.prompt_s + decode_s
    if not size:
        return Pools(0, split, decode, decode, jct_s)
    decode = replace(decode, arrivals_per_s=demand.tokens_per_s / demand.output / rest)
    share = split * demand.prefill / size
    prefill = _side(size, share, share)
    # The last token is computed where the answer is.
    jct_s += prefill.wait * split * demand.prompt_s + demand.move_s + demand.step_s
    return Pools(size, split, prefill, decode, jct_s)


def _side(num_engines: int, share: float, held_up: float) -> Side:
    wait, power = _wait(num_engines, share), _power(num_engines)
    # By how much longer all wait together for a little more work.
    return Side(share, held_up, wait * (power + share / (1 - share)) if share < _FULL else math.inf, wait)


def _wait(num_engines: int, share: float) -> float:
    """Until one of them, each busy for that share of its time, takes a prompt, over what computing one takes
    (Sakasegawa, "An approximation formula L_q = a * rho^b / (1 - rho)", 1977)."""
    return share ** _power(num_engines) / (num_engines * (1 - share)) if share < _FULL else math.inf


def _power(num_engines: int) -> float:
    return math.sqrt(2 * (num_engines + 1)) - 1


def _decoding(demand: Demand, num_engines: int, share: float) -> tuple[float, Side]:
    """Seconds for an answer on one of them that computes prompts for that share of its time, and that side."""
    rows = demand.row_s * demand.tokens_per_s / num_engines
    held_up, seconds, sequences = share, math.inf, 0.0
    for _ in range(_ROUNDS):
        left = 1 - held_up - rows
        seconds = demand.output * demand.step_s / left if left > 1 - _FULL else math.inf
        # Of many engines a prompt finds one with fewer sequences than most have.
        sequences = demand.tokens_per_s / demand.output * seconds / num_engines
        fewer = _FEWER * max(0, num_engines - 2) / num_engines
        held_up = share * (1 - fewer / sequences) if sequences > fewer else 0.0
    if sequences > _CROWDED * demand.max_sequences:
        seconds = math.inf
    return seconds, _side(num_engines, share, held_up)
