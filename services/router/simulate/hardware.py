"""What simulated engines and the network between them are able to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineHardware:
    """How long a step takes, in seconds for each unit of work in it, and what fits into one."""

    step_s: float = 24e-3  # the weights are read once, whatever the step computes
    prompt_token_s: float = 1.1e-3
    row_s: float = 1.5e-3  # a sequence that decodes
    context_token_s: float = 0.4e-5  # of those that decode
    attention_s: float = 0.4e-6  # prompt tokens times tokens before them
    page_size: int = 16  # tokens
    max_step_tokens: int = 512
    max_batch_size: int = 64
    max_context: int = 8192
    usable_pages: int = (
        1 << 20
    )  # of its prefix cache, least recently used ones first to go; sequences take none of them


# Fitted to steps of SmolLM2-135M on one core of a 2.5 GHz x86-64 VM with AVX-512, in float32 and with weights of eight
# bits.
HARDWARE = {
    "float32": EngineHardware(),
    "int8": EngineHardware(9.5e-3, 0.43e-3, 0.7e-3, 0.4e-5, 0.5e-6),
}


@dataclass(frozen=True, slots=True)
class FleetHardware:
    """The engines by name, and what is between them and the router."""

    engines: dict[str, EngineHardware]
    bytes_per_token: int = 46_080  # of KV
    bytes_per_s: float = 5e9  # between two engines
    call_s: float = 1.5e-3  # a call and its answer
    report_s: float = 0.1  # least time between two load reports

    def __post_init__(self) -> None:
        if not self.engines:
            raise ValueError("a fleet needs an engine")
