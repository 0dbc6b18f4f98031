"""Perplexity of the model on a text in the public domain: how much quantised layers lose, and KV of eight bits.

The text is Lewis Carroll, Alice's Adventures in Wonderland (1865). `python -m bench.engine.perplexity --kv-dtype fp8`
prints that of one way of computing, and over float32's.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer

from services.cli.fleet import core_count
from services.engine.attention.factory import make_attention
from services.engine.attention.stored import FLOAT8
from services.engine.core.plan import Segment
from services.engine.core.runner import make_batch
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import load_model, model_folder

TEXT = Path(__file__).parent.parent / "texts" / "alice.txt"
FORMS = {
    "float32": WeightForm.EXACT,
    "int8": WeightForm.BYTES,
    "packed": WeightForm.PACKED,
    "packed16": WeightForm.PACKED_16,
}
KV_DTYPES = {"auto": torch.float32, "fp8": FLOAT8}
WINDOW, PAGE_SIZE = 512, 16


def main(
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(FORMS)}.")] = "float32",
    kv_dtype: Annotated[str, typer.Option(help=f"One of {', '.join(KV_DTYPES)}.")] = "auto",
    tokens: Annotated[int, typer.Option(min=WINDOW, help="Tokens of the text.")] = 20_480,
    threads: Annotated[int, typer.Option(min=1)] = core_count(),
) -> None:
    """Prints the perplexity of SmolLM2-135M computed so, and over that in float32."""
    folder = model_folder("smollm2-135m")
    found, exact = (
        perplexity(folder, each, threads, tokens, kv) for each, kv in ((dtype, kv_dtype), ("float32", "auto"))
    )
    print(f"{dtype}, KV {kv_dtype}: {found:.3f}, {found / exact:.4f} of float32's {exact:.3f}")


@torch.inference_mode()
def perplexity(model: Path, dtype: str, threads: int, num_tokens: int, kv_dtype: str = "auto") -> float:
    """exp of the mean negative log-likelihood of the text's first tokens, each seen after at most 511 others."""
    cpu = torch.device("cpu")
    loaded = load_model(
        model, device=cpu, dtype=torch.float32, linear=linear_maker(cpu, torch.float32, threads, FORMS[dtype])
    )
    config = loaded.config
    shape = (config.num_layers, WINDOW // PAGE_SIZE, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    pool = torch.zeros(shape, dtype=KV_DTYPES[kv_dtype])
    attention = make_attention(None, pool, loaded.model.config, threads, torch.float32)
    tokenizer = Tokenizer.from_str(loaded.tokenizer.tokenizer_json.decode())
    ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False).ids[:num_tokens]
    if len(ids) < num_tokens:
        raise ValueError(f"the text has {len(ids)} tokens, not {num_tokens}")
    loss, count = 0.0, 0
    for begin in range(0, num_tokens, WINDOW):
        window = ids[begin : begin + WINDOW]
        batch = make_batch([Segment(0, 0, window, array("i", range(WINDOW // PAGE_SIZE)), None)], PAGE_SIZE, cpu)
        every_row = replace(batch, last=None)
        logits = loaded.model.logits(loaded.model.forward(every_row, attention)[:-1])
        loss += float(F.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += len(window) - 1
    return math.exp(loss / count)


if __name__ == "__main__":
    typer.run(main)
