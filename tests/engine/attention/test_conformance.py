"""What an attention backend is: every implementation against the oracle, over poisoned pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.oracle import OracleAttention
from services.engine.attention.paged_numba import PagedNumbaAttention
from services.engine.attention.problem import batch_of
from services.engine.batch import ForwardBatch

IMPLEMENTATIONS: dict[str, Callable[[Tensor], AttentionBackend]] = {
    "oracle": OracleAttention,
    "gather_sdpa": GatherSdpaAttention,
    "paged_numba": PagedNumbaAttention,
    "paged_numba, rows one by one": lambda kv: PagedNumbaAttention(kv, max_single_rows=10**6),
    "paged_numba, rows in blocks": lambda kv: PagedNumbaAttention(kv, num_threads=2, max_single_rows=0),
}
LAYERS, NUM_PAGES, KV_HEADS, HEADS, HEAD_DIM = 2, 60, 2, 6, 80
TOLERANCE = 1.5e-5
# (rows, context) of each sequence: decoding, whole prompts, chunks after a prefix, ragged, in one batch.
FORMS = {
    "plain": PLAIN,
    "scale": AttentionForm(scale=0.15),
    "window": AttentionForm(window=10),
    "window of one": AttentionForm(window=1),
    "wide window": AttentionForm(window=64),
    "soft cap": AttentionForm(softcap=5.0),
    "all": AttentionForm(scale=0.1, window=17, softcap=2.0),
}
MIXED = ((1, 1), (1, 37), (5, 5), (70, 90), (1, 16), (17, 40), (1, 17), (2, 64))


class Pool:
    """A NaN pool in which each sequence has written the KV of its whole context, and the batch that reads it."""

    def __init__(self, shape: Sequence[tuple[int, int]], page_size: int, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        num_pages = NUM_PAGES * 16 // page_size
        self.kv = torch.full((LAYERS, num_pages, 2, KV_HEADS, page_size, HEAD_DIM), torch.nan)
        self.page_size, self.shape = page_size, shape
        self._free = torch.randperm(num_pages, generator=self.random).tolist()
        pages = [[self._free.pop() for _ in range(-(-context // page_size))] for _, context in shape]
        widest = max(map(len, pages)) + 1
        self.tables = torch.tensor([row + [2**31 - 1] * (widest - len(row)) for row in pages], dtype=torch.int32)
        num_rows = sum(rows for rows, _ in shape)
        self.query = self.normal(num_rows, HEADS, HEAD_DIM) * 3
        self.keys = [self.normal(LAYERS, context, KV_HEADS, HEAD_DIM) for _, context in shape]
        self.values = [self.normal(LAYERS, context, KV_HEADS, HEAD_DIM) for _, context in shape]

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random)

    def slots(self, sequence: int) -> Tensor:
        positions = torch.arange(self.shape[sequence][1])
        return self.tables[sequence][positions // self.page_size].long() * self.page_size + positions % self.page_size

    def fill(self, backend: AttentionBackend) -> None:
        for layer in range(LAYERS):
            for sequence in range(len(self.shape)):
                key, value = self.keys[sequence][layer], self.values[sequence][layer]
                backend.write(layer, key, value, self.slots(sequence))

    def batch(self, sequences: Sequence[int], device: str = "cpu") -> ForwardBatch:
        counts = [self.shape[s][0] for s in sequences]
        contexts = [self.shape[s][1] for s in sequences]
        return batch_of(counts, contexts, self.tables[list(sequences)], device)

    def query_of(self, sequence: int) -> Tensor:
        start = sum(rows for rows, _ in self.shape[:sequence])
        return self.query[start : start + self.shape[sequence][0]]

    def expected(self, layer: int, sequence: int, form: AttentionForm = PLAIN) -> Tensor:
        """From the keys and values themselves, with no pages involved."""
        rows, context = self.shape[sequence]
        key, value = (part[sequence][layer].double() for part in (self.keys, self.values))
        key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
        scores = torch.einsum("rhd,chd->hrc", self.query_of(sequence).double(), key) * (form.scale or HEAD_DIM**-0.5)
        if form.softcap is not None:
            scores = form.softcap * (scores / form.softcap).tanh()
        hidden = torch.ones(rows, context, dtype=torch.bool).triu(context - rows + 1)
        if form.window is not None:
            hidden |= torch.ones(rows, context, dtype=torch.bool).tril(context - rows - form.window)
        return torch.einsum("hrc,chd->rhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value).float()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Callable[[Tensor], AttentionBackend]:
    torch.set_num_threads(1)
    return IMPLEMENTATIONS[request.param]


@pytest.mark.parametrize("group", [95, 96, 97, 128])
def test_many_query_heads_of_one_kv_head(implementation: Callable[[Tensor], AttentionBackend], group: int) -> None:
    """More than a block has lanes, too."""
    pool = Pool(((20, 30), (1, 9)), 16)
    backend = implementation(pool.kv)
    pool.fill(backend)
    query, batch = pool.normal(21, KV_HEADS * group, HEAD_DIM), pool.batch(range(2))
    expected = OracleAttention(pool.kv).attend(0, query, batch)
    torch.testing.assert_close(backend.attend(0, query, batch), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_mixed_batch(implementation: Callable[[Tensor], AttentionBackend], page_size: int, form: str) -> None:
    pool = Pool(MIXED, page_size)
    backend = implementation(pool.kv)
    pool.fill(backend)
    batch = pool.batch(range(len(MIXED)))
    for layer in range(LAYERS):
        actual = backend.attend(layer, pool.query, batch, FORMS[form])
        expected = torch.cat([pool.expected(layer, sequence, FORMS[form]) for sequence in range(len(MIXED))])
        assert actual.shape == pool.query.shape
        assert (actual - expected).abs().max() < TOLERANCE  # false for NaN


def test_write_changes_the_named_slots_only(implementation: Callable[[Tensor], AttentionBackend]) -> None:
    pool = Pool([(1, 20)], 8)
    backend = implementation(pool.kv)
    fused = pool.normal(3, 7 * KV_HEADS, HEAD_DIM)  # keys and values are slices of one projection
    slots = torch.tensor([5, 64, 13])
    key, value = fused[:, :KV_HEADS], fused[:, 3 * KV_HEADS : 4 * KV_HEADS]
    backend.write(1, key, value, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(pool.kv[1, slot // 8, 0, :, slot % 8], key[token])
        assert torch.equal(pool.kv[1, slot // 8, 1, :, slot % 8], value[token])
    assert pool.kv.isfinite().sum() == 2 * key.numel()


@pytest.mark.parametrize("form", ["plain", "soft cap"])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("missing", [0, 19, 64])
def test_a_key_that_is_missing_shows(
    implementation: Callable[[Tensor], AttentionBackend], missing: int, rows: int, form: str
) -> None:
    """Its value is there: the score alone must tell."""
    pool = Pool([(rows, 100)], 16)
    backend = implementation(pool.kv)
    pool.fill(backend)
    pool.kv[:, pool.tables[0, missing // 16], 0, :, missing % 16] = torch.nan
    assert backend.attend(0, pool.query, pool.batch([0]), FORMS[form]).isnan().all()


@pytest.mark.parametrize("form", ["plain", "soft cap"])
@pytest.mark.parametrize("rows", [1, 20])
def test_a_row_that_is_not_a_number_shows_and_spoils_no_other(
    implementation: Callable[[Tensor], AttentionBackend], rows: int, form: str
) -> None:
    pool = Pool([(rows, 100)], 16)
    backend = implementation(pool.kv)
    pool.fill(backend)
    pool.query[rows // 2] = torch.nan
    result = backend.attend(0, pool.query, pool.batch([0]), FORMS[form])
    assert [row.isnan().any() for row in result] == [row == rows // 2 for row in range(rows)]
    assert result[rows // 2].isnan().all()


def test_result_does_not_depend_on_the_rest_of_the_batch(implementation: Callable[[Tensor], AttentionBackend]) -> None:
    pool = Pool(MIXED, 8)
    backend = implementation(pool.kv)
    pool.fill(backend)
    for order in ([3, 1, 7], [7, 0, 3, 2], [3]):
        query = torch.cat([pool.query_of(sequence) for sequence in order])
        result = backend.attend(0, query, pool.batch(order))
        for sequence, rows in zip(order, result.split([MIXED[s][0] for s in order]), strict=True):
            assert (rows - pool.expected(0, sequence)).abs().max() < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_single_rows_are_computed_as_alone_and_those_before_them_as_without_them(form: str) -> None:
    """To the last bit."""
    shape, single = ((70, 90), (30, 40), (12, 12), (5, 25), (1, 9), (1, 30)), (30, 0, 12, 2, 0, 1)
    pool = Pool(shape, 16)
    backend, in_blocks = PagedNumbaAttention(pool.kv), PagedNumbaAttention(pool.kv, max_single_rows=0)
    row_by_row = PagedNumbaAttention(pool.kv, max_single_rows=10**6)
    pool.fill(backend)
    every = pool.batch(range(len(shape)))
    batch = replace(every, single_rows=torch.tensor(single, dtype=torch.int32))
    result = backend.attend(0, pool.query, batch, FORMS[form]).split([rows for rows, _ in shape])
    singly = row_by_row.attend(0, pool.query, every, FORMS[form]).split([rows for rows, _ in shape])
    for sequence, ((rows, context), num_single) in enumerate(zip(shape, single, strict=True)):
        others = rows - num_single
        assert torch.equal(result[sequence][others:], singly[sequence][others:])
        if others:
            before = batch_of([others], [context - num_single], pool.tables[[sequence]], "cpu")
            alone = in_blocks.attend(0, pool.query_of(sequence)[:others], before, FORMS[form])
            assert torch.equal(result[sequence][:others], alone)


def test_query_may_be_a_slice(implementation: Callable[[Tensor], AttentionBackend]) -> None:
    pool = Pool([(30, 30), (1, 9)], 16)
    backend = implementation(pool.kv)
    pool.fill(backend)
    wider = torch.cat((pool.query, pool.query), dim=1)[:, :HEADS]
    assert not wider.is_contiguous()
    result = backend.attend(0, wider, pool.batch([0, 1]))
    assert (result[:30] - pool.expected(0, 0)).abs().max() < TOLERANCE


def test_large_scores_do_not_overflow(implementation: Callable[[Tensor], AttentionBackend]) -> None:
    pool = Pool([(1, 50), (20, 50)], 16)
    backend = implementation(pool.kv)
    pool.fill(backend)
    pool.query *= 1000
    result = backend.attend(0, pool.query, pool.batch([0, 1]))
    expected = torch.cat([pool.expected(0, 0), pool.expected(0, 1)])
    assert (result - expected).abs().max() < 1e-3  # differences of scores of 10,000 in float32


def test_layers_of_different_form_share_a_batch(implementation: Callable[[Tensor], AttentionBackend]) -> None:
    pool = Pool(MIXED, 8)
    backend = implementation(pool.kv)
    pool.fill(backend)
    batch = pool.batch(range(len(MIXED)))
    for name in ("window", "plain", "soft cap", "all", "wide window", "plain"):
        actual = backend.attend(1, pool.query, batch, FORMS[name])
        expected = torch.cat([pool.expected(1, sequence, FORMS[name]) for sequence in range(len(MIXED))])
        assert (actual - expected).abs().max() < TOLERANCE, name
