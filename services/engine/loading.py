"""A model as an engine's options ask for it, on each rank alike."""

from __future__ import annotations

import os

import torch

from services.engine.attention.stored import FLOAT8, FLOAT8_CAPABILITY
from services.engine.config import EngineConfig
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import NEEDED
from services.engine.model.loader import LoadedModel, load_model
from services.engine.model.shard import Shard
from services.rpc.errors import StartError

_MIB = 1 << 20
_DEFAULT_MIB = 1024
TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": FLOAT8,
}


def load(config: EngineConfig, device: torch.device, shard: Shard) -> LoadedModel:
    """Reads the weights. Raises ModelError with a sentence, or StartError for a GPU that cannot compute them."""
    if device.type == "cuda":
        check_capability(config, torch.cuda.get_device_capability(device))
    pool_tokens = None if config.pages is None else config.pages * config.page_size
    return load_model(
        config.model,
        device=device,
        dtype=TORCH_DTYPES[config.dtype_name],
        kv_dtype=TORCH_DTYPES[config.kv_dtype_name],
        linear=linear_maker(device, TORCH_DTYPES[config.dtype_name], config.num_threads, config.weight_form),
        shard=shard,
        max_context=min((most for most in (config.max_context, pool_tokens) if most is not None), default=None),
        pool_bytes=_most_pool_bytes(config, device) if pool_tokens is None else None,
    )


def check_capability(config: EngineConfig, capability: tuple[int, int]) -> None:
    """Raises StartError if a GPU of that compute capability lacks what --dtype or --kv-dtype needs."""
    for option, needed in (
        (f"--dtype {config.dtype}", NEEDED.get(config.weight_form, (0, 0))),
        (f"--kv-dtype {config.kv_dtype}", FLOAT8_CAPABILITY if config.kv_dtype == "fp8" else (0, 0)),
    ):
        if capability < needed:
            has, wants = (".".join(map(str, each)) for each in (capability, needed))
            raise StartError(f"{option} needs a GPU of compute capability {wants}, and {config.device} has {has}")


def set_torch_threads(config: EngineConfig) -> None:
    """One where a team of our own computes linear layers: two sets of threads that look for work slow each other."""
    has_team = config.device == "cpu" and config.dtype_name == "float32"
    torch.set_num_threads(1 if has_team else config.num_threads)


def torch_device(config: EngineConfig, rank: int = 0) -> torch.device:
    """Where a rank computes: each on a GPU of its own, from the one that is named. Raises StartError."""
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise StartError(f"--device {config.device} is no device") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise StartError(f"--device {config.device}: there is no GPU that torch can use")
        if (device.index or 0) + config.tp > torch.cuda.device_count():
            raise StartError(f"--tp {config.tp} from {config.device} on: there are {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", (device.index or 0) + rank)
        use_device(device)
    return device


def use_device(device: torch.device) -> None:
    """Makes the GPU the one that this thread's kernels go to: every thread begins with the first one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _most_pool_bytes(config: EngineConfig, device: torch.device) -> int:
    """No pool will be larger, whatever is free on a GPU when the model is loaded."""
    if device.type == "cuda" and config.kv_memory_mib is None:
        return int(torch.cuda.mem_get_info(device)[1])
    return kv_bytes(config, device)


def kv_bytes(config: EngineConfig, device: torch.device) -> int:
    """The size of a pool where --pages does not say it; on a GPU half of what is free now."""
    if config.kv_memory_mib is not None:
        return config.kv_memory_mib * _MIB
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took and holds no more
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    return min(_DEFAULT_MIB * _MIB, machine_bytes() // 8)


def machine_bytes() -> int:
    """The memory of the machine, whatever else limits this process."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
