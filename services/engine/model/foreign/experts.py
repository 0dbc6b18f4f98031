"""Experts of ours in the place of those that a model of transformers keeps as one tensor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from services.engine.kernels.jobs import Jobs
from services.engine.kernels.team import Team
from services.engine.model.linear.linear import LinearFactory, TeamLinear

# What transformers' decorator of classes of experts says of them (integrations/moe.py) since 5.0.0; has_gate and
# has_post_expert_norm came later, and without them there is a gate and no such norm.
_DESCRIPTION = ("has_bias", "is_transposed", "_apply_gate")

_log = logging.getLogger(__name__)


def replace_experts(model: torch.nn.Module, make: LinearFactory, team: Team) -> None:
    """Every collection of experts that transformers knows as such becomes linear layers of the team, two an expert.
    What else has weights like theirs stays torch's, with its one thread, and is named in the log."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_described(child):
                setattr(parent, name, _InPlaceOfExperts(child, make, team))
    left = {type(module).__name__ for module in model.modules() if _is_like_experts(module)}
    if left:
        fields = {"modules": ", ".join(sorted(left))}
        _log.warning("weights like those of experts are left to torch, on one thread", extra={"fields": fields})


def _is_described(module: Any) -> bool:
    own = module._parameters
    return all(hasattr(module, each) for each in _DESCRIPTION) and _up_name(module) in own and "down_proj" in own


def _is_like_experts(module: torch.nn.Module) -> bool:
    is_convolution = isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))
    return not is_convolution and any(each.dim() == 3 for each in module.parameters(recurse=False))


def _up_name(experts: Any) -> str:
    return "gate_up_proj" if _has_gate(experts) else "up_proj"


def _has_gate(experts: Any) -> bool:
    return bool(getattr(experts, "has_gate", True))


class _InPlaceOfExperts(torch.nn.Module):
    """See `batched_mm_experts_forward` of transformers: the same sums, of only those experts that a token chose."""

    def __init__(self, experts: Any, make: LinearFactory, team: Team) -> None:
        super().__init__()
        self._experts = experts  # without weights: what they do between the products
        self._team = team
        self._up = _layers(experts, _up_name(experts), make)
        self._down = _layers(experts, "down_proj", make)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (num_tokens, hidden), top_k_index and top_k_weights (num_tokens, chosen), to (num_tokens,
        hidden)."""
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen, minlength=len(self._up))[: len(self._up)].tolist()
        # By expert; what chose one that there is not comes last, and adds nothing.
        order = chosen.argsort(stable=True)[: sum(counts)]
        if not order.numel():
            return torch.zeros_like(hidden_states)
        rows = self._multiply(self._up, hidden_states[order // top_k_index.shape[1]], counts)
        rows = self._experts._apply_gate(rows) if _has_gate(self._experts) else self._experts.act_fn(rows)
        rows = self._multiply(self._down, rows.contiguous(), counts)
        if getattr(self._experts, "has_post_expert_norm", False):
            rows = self._experts.post_expert_norm(rows)
        parts = hidden_states.new_zeros(chosen.shape[0], hidden_states.shape[1])
        parts[order] = rows * top_k_weights.reshape(-1)[order, None]
        return parts.view(*top_k_index.shape, -1).sum(1)

    def _multiply(self, layers: Sequence[TeamLinear], rows: Tensor, counts: Sequence[int]) -> Tensor:
        """rows, so many for each expert, through its layer: all of them in one call of compiled code."""
        jobs = Jobs(self._team)
        parts = zip(layers, rows.split_with_sizes(list(counts)), strict=True)
        results = [layer.add_to(jobs, part) for layer, part in parts if part.shape[0]]
        jobs.run()
        return torch.cat(results)


def _layers(experts: Any, name: str, make: LinearFactory) -> list[TeamLinear]:
    """A layer for each expert; the weights that they are made of are let go."""
    weights = experts._parameters.pop(name).detach()
    weights = weights.transpose(1, 2) if experts.is_transposed else weights  # (experts, out, in)
    biases = experts._parameters.pop(f"{name}_bias").detach() if experts.has_bias else [None] * len(weights)
    return [cast(TeamLinear, make(weight, bias)) for weight, bias in zip(weights, biases, strict=True)]
