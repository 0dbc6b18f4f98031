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

    @classmethod
    def alike(cls, name: str, count: int) -> FleetHardware:
        """So many engines of that name in HARDWARE, and what is between them."""
        kind = HARDWARE[name]
        return cls(
            {f"engine-{number}": kind.engine for number in range(count)},
            bytes_per_token=kind.bytes_per_token,
            bytes_per_s=kind.bytes_per_s,
            call_s=kind.call_s,
        )


@dataclass(frozen=True, slots=True)
class Kind:
    """Engines with a model, and how others are reached from them: as in FleetHardware."""

    engine: EngineHardware
    bytes_per_token: int = 46_080
    bytes_per_s: float = 5e9
    call_s: float = 1.5e-3


# Share of their arithmetic that GPUs reach in computing prompts, found by what the paper measured.
PREFILL_SHARE = 1 / 3
# Llama-3.1-70B with weights of eight bits on four H100, by what these can do: 70.6e9 bytes of weights and 327,680 of KV
# a token (80 layers, keys and values of 8 heads of 128, two bytes each) at 80 % of 4 x 3.35 TB/s, 160 reductions a step
# at 12 us, 141e9 operations a token of a prompt at PREFILL_SHARE of 4 x 1,979 TFLOP/s, and 2.6e6 for each token before
# it at 40 % of 4 x 989.
_KV_BYTES = 327_680
_LLAMA_70B = EngineHardware(
    step_s=70.6e9 / (0.8 * 4 * 3.35e12) + 160 * 12e-6,
    prompt_token_s=141e9 / (PREFILL_SHARE * 4 * 1979e12),
    row_s=2e-5,
    context_token_s=_KV_BYTES / (0.8 * 4 * 3.35e12),
    attention_s=2.6e6 / (0.4 * 4 * 989e12),
    max_step_tokens=2048,
    max_batch_size=128,
)
HARDWARE = {
    # Fitted to steps of SmolLM2-135M on one core of a 2.5 GHz x86-64 VM with AVX-512, in float32 and with weights of
    # eight bits.
    "float32": Kind(EngineHardware()),
    "int8": Kind(EngineHardware(9.5e-3, 0.43e-3, 0.7e-3, 0.4e-5, 0.5e-6)),
    "70b-h100x4": Kind(_LLAMA_70B, _KV_BYTES, bytes_per_s=200e9, call_s=1e-3),
}
