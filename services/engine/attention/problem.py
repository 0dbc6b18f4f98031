"""What attention backends are tried on at the start: two long sequences, over pages that hold NaN elsewhere."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from services.engine.attention.backend import AttentionBackend
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.oracle import OracleAttention
from services.engine.batch import ForwardBatch

CONTEXTS = (520, 390)
CHUNK = (11, 1)  # rows of the two sequences: more than 8 are computed in blocks by every backend
LAST_ROWS = [10, 11]  # of the two sequences: what they would compute if both decoded
FORMS = (PLAIN, AttentionForm(scale=0.1, window=300, softcap=5.0))
# Values go up to about 3, and kernels round probabilities to the query's type before they weigh values with them.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Rows of each sequence: decoding, and a chunk; of contexts so long, over pages used again and again. With less the
# launches would be timed.
TIMED, LONG = ([1] * 8, [2048]), 4096
TIMING_S = 0.05  # begun rounds are finished
MAX_ROUNDS = 5


class WrongResult(Exception):
    """A backend does not compute what the oracle does."""


class Problem:
    """A small pool of the arrangement, device and type of `kv`, one layer, and what is computed over it in `dtype`."""

    def __init__(self, kv: Tensor, num_heads: int, dtype: torch.dtype) -> None:
        num_kv_heads, page_size, head_dim = kv.shape[3:]
        self._dtype = dtype
        self._random = torch.Generator().manual_seed(0)
        counts = [-(-context // page_size) for context in CONTEXTS]
        order = torch.split(torch.randperm(sum(counts), generator=self._random).to(torch.int32), counts)
        self._tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for table, pages in zip(self._tables, order, strict=True):
            table[: len(pages)] = pages
        pool = torch.full((1, sum(counts), 2, num_kv_heads, page_size, head_dim), torch.nan, dtype=kv.dtype)
        oracle = OracleAttention(pool)
        for table, context in zip(self._tables, CONTEXTS, strict=True):
            positions = torch.arange(context)
            slots = table[positions // page_size].long() * page_size + positions % page_size
            key, value = self._normal(2, context, num_kv_heads, head_dim)
            oracle.write(0, key, value, slots)
        self.kv = pool.to(kv.device)
        self._query = (self._normal(sum(CHUNK), num_heads, head_dim) * 3).to(dtype)
        batch = self._batch(CHUNK, range(2), "cpu")
        self._expected = [oracle.attend(0, self._query, batch, form) for form in FORMS]

    def check(self, backend: AttentionBackend) -> None:
        """Raises WrongResult, or what the backend raises, unless it computes what the oracle does.

        Memory that the backend allocates is filled with NaN, so that rows which it forgets show.
        """
        for rows, chosen in (((1, 1), LAST_ROWS), (CHUNK, slice(None))):
            batch, query = self._batch(rows, range(2), self.kv.device), self._query[chosen].to(self.kv.device)
            for form, expected in zip(FORMS, self._expected, strict=True):
                with uninitialized_is_nan():
                    actual = backend.attend(0, query, batch, form)
                difference = float((actual.cpu().float() - expected[chosen].float()).abs().max())
                if not difference <= TOLERANCES[self._dtype]:  # NaN is not
                    raise WrongResult(f"differs by {difference:.2g} from the oracle with {rows} rows and {form}")

    def seconds(self, backends: Mapping[str, AttentionBackend]) -> dict[str, float]:
        """The shortest time of each for a decoding batch and a chunk, in rounds that take turns."""
        device = self.kv.device
        batches = [self._long_batch(rows, device) for rows in TIMED]
        work = [(self._query[:1].expand(each.num_tokens, -1, -1).to(device), each) for each in batches]
        shortest = dict.fromkeys(backends, float("inf"))
        end = time.perf_counter() + TIMING_S
        for _ in range(MAX_ROUNDS):
            for name, backend in backends.items():
                began = time.perf_counter()
                for query, batch in work:
                    backend.attend(0, query, batch)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                shortest[name] = min(shortest[name], time.perf_counter() - began)
            if time.perf_counter() > end:
                break
        return shortest

    def _batch(self, rows: Sequence[int], sequences: Sequence[int], device: torch.device | str) -> ForwardBatch:
        """Rows at the ends of the sequences named, one of which may occur several times."""
        chosen = list(sequences)[: len(rows)]
        return batch_of(rows, [CONTEXTS[sequence] for sequence in chosen], self._tables[chosen], device)

    def _long_batch(self, rows: Sequence[int], device: torch.device) -> ForwardBatch:
        """Rows at the ends of sequences of LONG tokens, all over the pages of the first one."""
        page_size = self.kv.shape[4]
        pages = self._tables[0, : -(-CONTEXTS[0] // page_size)]
        table = pages.repeat(-(-LONG // (len(pages) * page_size)))
        return batch_of(rows, [LONG] * len(rows), table.repeat(len(rows), 1), device)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random)


def batch_of(rows: Sequence[int], contexts: Sequence[int], tables: Tensor, device: torch.device | str) -> ForwardBatch:
    """Rows at the ends of sequences."""
    ignored = torch.zeros(sum(rows), dtype=torch.int64, device=device)
    return ForwardBatch(
        token_ids=ignored,
        positions=ignored,
        slots=ignored,
        query_starts=torch.tensor([0, *rows]).cumsum(0).int(),
        context_lengths=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables.to(device),
        logits_rows=ignored,
    )


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Has torch fill what it allocates: that comes with its deterministic mode.

    use_deterministic_algorithms would do the same, but loads the compiler first, which takes longer than all else here.
    What is not deterministic on a GPU, matrix products among it, warns in that mode: nobody asked for that.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)
