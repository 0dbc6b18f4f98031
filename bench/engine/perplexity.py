"""Perplexity of the model on a text in the public domain: how much quantised layers lose.

The text is Lewis Carroll, Alice's Adventures in Wonderland (1865).
"""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from services.engine.attention.factory import make_attention
from services.engine.core.plan import Segment
from services.engine.core.runner import make_batch
from services.engine.model.linear.factory import linear_maker
from services.engine.model.linear.form import WeightForm
from services.engine.model.loader import load_model

TEXT = Path(__file__).parent.parent / "texts" / "alice.txt"
FORMS = {
    "float32": WeightForm.EXACT,
    "int8": WeightForm.BYTES,
    "packed": WeightForm.PACKED,
    "packed16": WeightForm.PACKED_16,
}
WINDOW, PAGE_SIZE = 512, 16


@torch.inference_mode()
def perplexity(model: Path, dtype: str, threads: int, num_tokens: int) -> float:
    """exp of the mean negative log-likelihood of the text's first tokens, each seen after at most 511 others."""
    cpu = torch.device("cpu")
    loaded = load_model(
        model, device=cpu, dtype=torch.float32, linear=linear_maker(cpu, torch.float32, threads, FORMS[dtype])
    )
    config = loaded.config
    shape = (config.num_layers, WINDOW // PAGE_SIZE, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    attention = make_attention(None, torch.zeros(shape), loaded.model.config, threads)
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
