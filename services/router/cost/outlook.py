"""What engines will be busy with, from what they do of late."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from services.router.cost.pools import Demand, Side, best_pools
from services.router.cost.speeds import DecodeWork, EngineSpeeds, LinkSpeed, SendWork, StepsWork

FADING_S = 20.0  # of what was done so long ago a third counts
_SHORTEST_S = 1.0  # what was seen for less says little of a second
_FEWEST_PER_S = 1e-6  # tokens: of a fleet that does nothing, what is left of what it did says nothing
_STAYS = 0.2  # of an engine's time: by how much another must do more of it to take a place in the pool
# Closer to all of an engine's time, averages say nothing.
_MOST = 0.9
_MOST_BEHIND = _MOST / (1 - _MOST) ** 2

_IDLE = Side(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of a model's engines, while its traffic stays as it is. As it is made: nothing is known."""

    prefill_pool: frozenset[str] = frozenset()  # addresses of those that had better compute prompts for the others
    in_pool: Side = _IDLE
    others: Side = _IDLE
    prompt_s: float = 0.0  # to compute one, on average

    def slowdown(self, address: str) -> float:
        """How much longer sequences there take for prompts to come."""
        return 1 / (1 - min(_MOST, self._side(address).held_up))

    def num_behind(self, address: str, wait_s: float, compute_s: float) -> float:
        """Requests to come that each second of computing a prompt there holds up, if it takes `compute_s` and the
        engine has `wait_s` to do before: prompts that will find it busy, and sequences that will come meanwhile."""
        side = self._side(address)
        # The busier it is now, the longer until it has caught up, and the more come until then.
        busier = (1 + wait_s / self.prompt_s) / (1 + side.wait) if self.prompt_s else 0.0
        return min(_MOST_BEHIND, side.num_behind) * busier + side.arrivals_per_s * compute_s / 2

    def _side(self, address: str) -> Side:
        return self.in_pool if address in self.prefill_pool else self.others


class Flow:
    """What an engine does a second, of late."""

    def __init__(self, at_s: float) -> None:
        self._begin_s = self._at_s = at_s
        self._done = StepsWork(0.0)

    def add(self, work: StepsWork, at_s: float) -> None:
        """It has done so much since it last told."""
        self._done = self._done * self._left(at_s) + work
        self._at_s = at_s

    def per_s(self, at_s: float) -> StepsWork:
        """A second, on average."""
        age_s = max(_SHORTEST_S, at_s - self._begin_s)
        return self._done * (self._left(at_s) / (FADING_S * (1 - math.exp(-age_s / FADING_S))))

    def _left(self, at_s: float) -> float:
        """What is left of what was done."""
        return math.exp((self._at_s - at_s) / FADING_S)


def look(
    flows: Mapping[str, StepsWork],
    speeds: EngineSpeeds,
    link: LinkSpeed,
    output: float,
    max_sequences: float,
    before: Outlook,
) -> Outlook:
    """The outlook of engines by address that do so much a second, all with these speeds and links, each decoding
    `max_sequences` at once, where answers have `output` tokens on average; `before`: what it was. There is nothing to
    tell without two engines, prompts and answers, nor where all engines had better do everything: each request finds
    the best place for itself then."""
    if len(flows) < 2:
        return Outlook()
    prefill = {address: _prefill(flow, speeds) for address, flow in flows.items()}
    total = StepsWork(*map(sum, zip(*(flow.features for flow in flows.values()), strict=True)))
    if min(total.rows, total.prompt_tokens) < _FEWEST_PER_S or not sum(prefill.values()):
        return Outlook()
    num_steps = max(1.0, output - 1)  # the first token comes of the prompt
    requests_per_s = total.rows / num_steps
    step_s = speeds.step_s(DecodeWork(0, 0))
    prompt_s = sum(prefill.values()) / requests_per_s + step_s
    demand = Demand(
        num_engines=len(flows),
        prefill=sum(prefill.values()),
        tokens_per_s=total.rows,
        prompt_s=prompt_s,
        output=num_steps,
        step_s=step_s,
        row_s=speeds.step_s(DecodeWork(1, total.row_context / total.rows)) - step_s,
        move_s=speeds.reserve_s + link.send_s(SendWork(0, round(total.prompt_tokens / requests_per_s))),
        max_sequences=max_sequences,
    )
    pools = best_pools(demand, len(before.prefill_pool))
    if not pools.num_prefill:
        return Outlook()
    # Those that do more of it than of decoding already: routers that see the same reports find much the same ones.
    more = {
        address: prefill[address] - _decode(flow, speeds) + _STAYS * (address in before.prefill_pool)
        for address, flow in flows.items()
    }
    ranked = sorted(more, key=lambda address: (-more[address], address))
    return Outlook(frozenset(ranked[: pools.num_prefill]), pools.prefill, pools.decode, prompt_s)


def _prefill(flow: StepsWork, speeds: EngineSpeeds) -> float:
    """Part of an engine's time that is spent on prompts."""
    _, token_s, context_s, _, _ = speeds.steps.coefficients
    return flow.prompt_tokens * token_s + flow.prompt_context * context_s


def _decode(flow: StepsWork, speeds: EngineSpeeds) -> float:
    """That part which is spent on sequences: on the steps themselves as far as there are any."""
    step_s, _, _, row_s, context_s = speeds.steps.coefficients
    return min(flow.steps, flow.rows) * step_s + flow.rows * row_s + flow.row_context * context_s
