"""python -m bench.gpu: one GPU with the shapes of Llama-3.1-8B, random weights; the roofline beside every number.

Each part stands alone: one that fails prints why, and the others go on. Writes build/bench/gpu.json, flat figures,
without those of parts that failed or found no time.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import time
import traceback
from pathlib import Path

import torch

from bench.gpu.parts import Bench
from bench.gpu.shapes import full

RESULT = Path("build/bench/gpu.json")
BUDGET_S = 420.0  # no part is begun after so long
# What the issue asks of a GPU of the H200's class.
TARGETS = {
    "one_stream_step_over_weights": "at most 1.2", "decode_attention_share": "at least 0.75",
    "prefill_share": "at least 0.55", "large_batch_share": "at least 0.6", "kv_copy_share": "at least 0.5",
}  # fmt: skip
# Those of parts that need a GPU.
GPU_TARGETS = {
    **dict.fromkeys(("one_stream_gap_p50_us", "batch_gap_p50_us", "large_batch_gap_p50_us"), "under 50"),
    "kv_copy_kernel_share": "at least 0.8",
}
PEERS = ("vllm", "sglang", "flashinfer", "flash_attn", "transformers")


def main() -> None:
    """Measures part by part, printing as it goes."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", help="names of parts, with commas between them; the ceilings are always measured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU that torch can use here: nothing is measured.")
        return
    logging.basicConfig(level=logging.INFO, format="  %(message)s %(fields)s", force=True)
    logging.getLogger().handlers[0].addFilter(_with_fields)
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print("peers not compared here: " + ", ".join(f"{each} ({_presence(each)})" for each in PEERS))
    figures = run(Bench(full(), device), options.only.split(",") if options.only else None)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def run(bench: Bench, only: list[str] | None = None, budget_s: float = BUDGET_S) -> dict[str, float]:
    """All parts, or the ceilings and those named, while there is time."""
    figures: dict[str, float] = {}
    began = time.monotonic()
    for name, measure in bench.parts.items():
        if only is not None and name not in (*only, "ceilings"):
            continue
        if time.monotonic() - began > budget_s:
            print(f"{name}: left out, the time is up", flush=True)
            continue
        part_began = time.monotonic()
        try:
            found = measure()
        except Exception:
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
            continue
        finally:
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        figures |= {key: round(value, 4) for key, value in found.items()}
        for key, value in found.items():
            wanted = (TARGETS | GPU_TARGETS).get(key)
            target = f"   ({wanted})" if wanted else ""
            print(f"{name}: {key} {value:.4g}{target}", flush=True)
        print(f"{name}: took {time.monotonic() - part_began:.1f} s", flush=True)
    return figures


def _presence(module: str) -> str:
    return "installed" if importlib.util.find_spec(module) is not None else "missing"


def _with_fields(record: logging.LogRecord) -> bool:
    record.__dict__.setdefault("fields", "")
    return True


if __name__ == "__main__":
    main()
