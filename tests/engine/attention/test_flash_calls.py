"""What is told to the FlashAttention libraries, taken at its word: functions with their parameters, in plain torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.attention import flash_attn, flash_attn_3, torch_varlen
from services.engine.attention.backend import AttentionBackend, BackendUnavailable
from services.engine.attention.paged_metadata import require_parameters
from tests.engine.attention.gpu_backends import check_mixed, check_problem
from tests.engine.attention.test_conformance import FORMS


def attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, contexts: Tensor, tables: Tensor,
    scale: float, window: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """Row i of q of a sequence is aligned with its context's end; window counts tokens before and after that place."""
    left, right = window[0], 0 if window[1] < 0 else window[1]
    mixed, page_size = torch.full_like(query, torch.nan), key.shape[1]
    for sequence, context in enumerate(contexts.tolist()):
        pages = tables[sequence, : -(-context // page_size)].long()
        keys, values = (each[pages].flatten(0, 1)[:context].double() for each in (key, value))
        rows = query[starts[sequence] : starts[sequence + 1]].double()
        group = rows.shape[1] // keys.shape[1]
        scores = torch.einsum("qhd,khd->hqk", rows, keys.repeat_interleave(group, 1)) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        place = torch.arange(context - len(rows), context)[:, None]
        token = torch.arange(context)
        hidden = (token > place + right) | ((token < place - left) if left >= 0 else torch.tensor(False))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mixed[starts[sequence] : starts[sequence + 1]] = torch.einsum(
            "hqk,khd->qhd", weights, values.repeat_interleave(group, 1)
        ).to(query.dtype)
    return mixed


def version_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    contexts = cu_seqlens_k.diff()
    assert causal
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(contexts.max()))
    return attention(q, k, v, cu_seqlens_q, contexts, block_table, softmax_scale, window_size, softcap)


def version_3(
    q: Tensor, k_cache: Tensor, v_cache: Tensor,
    *, cache_seqlens: Tensor, page_table: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, softmax_scale: float,
    causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    assert causal
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    return attention(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, softmax_scale, window_size, softcap)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    num_splits: int,
) -> Tensor:  # fmt: skip
    assert num_splits == 1
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert torch.equal(cu_seq_k.diff(), seqused_k)
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(seqused_k.max()))
    return attention(query, key, value, cu_seq_q, seqused_k, block_table, scale, window_size, 0.0)


# Module of the backend, its class, and where it finds which function.
LIBRARIES: dict[str, tuple[ModuleType, Any, str, str, Callable[..., Tensor]]] = {
    "flash_attn": (flash_attn, flash_attn.FlashAttnAttention, "flash_attn", "flash_attn_varlen_func", version_2),
    "flash_attn_3": (
        flash_attn_3, flash_attn_3.FlashAttn3Attention, "flash_attn_interface", "flash_attn_with_kvcache", version_3,
    ),
    "torch_varlen": (
        torch_varlen, torch_varlen.TorchVarlenAttention, "torch.nn.attention.varlen", "varlen_attn", varlen,
    ),
}  # fmt: skip


@pytest.fixture(params=LIBRARIES)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], AttentionBackend]:
    """The backend over a library that computes on the CPU."""
    module, backend, name, function, stand_in = LIBRARIES[request.param]
    library = ModuleType(name)
    setattr(library, function, stand_in)
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(module, "check_flash_pool", lambda kv, *, page_multiple: None)
    made: Callable[[Tensor], AttentionBackend] = backend
    return made


def test_two_long_sequences(make: Callable[[Tensor], AttentionBackend]) -> None:
    check_problem(make, "cpu", torch.float32, 16, (6, 2, 16))


@pytest.mark.parametrize("form", FORMS)
def test_mixed_batch(make: Callable[[Tensor], AttentionBackend], form: str) -> None:
    check_mixed(make, "cpu", torch.float32, 8, form)


def test_a_library_of_another_version_is_refused_by_what_it_lacks() -> None:
    require_parameters(version_3, flash_attn_3.WANTED, "this one")
    with pytest.raises(BackendUnavailable, match=r"this one has no page_table, cache_seqlens$"):
        require_parameters(version_2, ("page_table", "cache_seqlens", "cu_seqlens_q", "causal"), "this one")
