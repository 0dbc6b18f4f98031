"""What an engine queues on a GPU, run to its end without one: devices, types and shapes fit, and nothing waits."""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.engine import make_pool
from bench.gpu.parts import decoding_batch, prompt_batch
from bench.gpu.shapes import random_model, tiny
from services.engine.attention.backend import AttentionBackend, BackendUnavailable
from services.engine.attention.flash_attn import FlashAttnAttention
from services.engine.attention.flash_attn_3 import FlashAttn3Attention
from services.engine.attention.flashinfer import FlashInferAttention
from services.engine.attention.form import PLAIN, AttentionForm
from services.engine.attention.gather_sdpa import GatherSdpaAttention
from services.engine.attention.problem import FORMS, LONG, Problem
from services.engine.attention.stored import FLOAT8
from services.engine.attention.torch_varlen import TorchVarlenAttention
from services.engine.attention.triton_prefill import TritonPrefillAttention
from services.engine.batch import ForwardBatch
from services.engine.core.plan import PageCopy, RunnerBroken, Segment, StepPlan
from services.engine.gpu import runner as runners
from services.engine.gpu.graphs import DecodeGraphs
from services.engine.gpu.marks import LayerMarks
from services.engine.gpu.runner import QueuedRunner
from services.engine.model import decoder
from services.engine.model.decoder import Decoder
from services.engine.model.ops import TorchOps
from tests.engine.gpu.fake_cuda import CPU, GPU, FakeCuda, OtherDevice, Phase, Waits, fake_cuda
from tests.engine.gpu.test_choosing import random_spec

pytestmark = pytest.mark.slow

PAGE_SIZE = tiny().page_size


class Passed:
    """A mark that the device has passed."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Launches(ModuleType):
    """Kernels that take what is on the GPU, and compute nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Kernel()


class _Kernel:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid)
        assert all(size < 2**16 for size in grid[1:]), "CUDA takes no more"

        def launch(*arguments: Any, **constants: Any) -> None:
            for each in (*arguments, *constants.values()):
                assert not isinstance(each, Tensor) or each.device == GPU
                assert isinstance(each, Tensor | int | float | bool), type(each)

        return launch


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as gpu:
        yield gpu


@pytest.fixture(params=["plain", "triton", "plain, fp8 KV", "triton, fp8 KV"])
def parts(
    gpu: FakeCuda, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Decoder, AttentionBackend, Tensor]:
    """A model, attention and a pool."""
    kind, _, kv_kind = request.param.partition(", ")
    if kind == "triton":
        request.getfixturevalue("interpreted")
        from services.engine.model import triton_ops

        monkeypatch.setattr(triton_ops, "kernels", Launches("kernels"))
        make_ops: Callable[..., Any] = lambda config, *_: triton_ops.TritonOps(config)  # noqa: E731
        monkeypatch.setattr(triton_ops, "_KINDS", {"silu": 0})
    else:
        make_ops = lambda config, *_: TorchOps(config)  # noqa: E731
    monkeypatch.setattr(decoder, "make_ops", make_ops)
    model = random_model(tiny(), GPU)
    kv = make_pool(tiny(), 512, GPU, FLOAT8 if kv_kind else None)
    if kind == "plain":
        return model, GatherSdpaAttention(kv), kv
    attention = TritonPrefillAttention(kv)
    attention._kernels = attention._prefill_kernels = Launches("kernels")
    return model, attention, kv


def test_steps_are_queued_without_waiting(gpu: FakeCuda, parts: tuple[Decoder, AttentionBackend, Tensor]) -> None:
    """Prompts, pieces and decoding with all that requests may ask for; the second step follows the first."""
    model, attention, kv = parts
    source, layers = random.Random(0), list[int]()
    runner = QueuedRunner(model, attention, kv, (7,), new_mark=lambda device: Passed())
    prompts = [Segment(n, 0, list(range(20 + n)), array("i", [3 * n, 3 * n + 1, 9]), _spec(source)) for n in range(9)]
    piece = Segment(9, 16, list(range(3)), array("i", [28, 29]), None)
    decoding = [
        Segment(segment.number, segment.end, [], segment.page_ids, _spec(source, num_awaited=1), follows=True)
        for segment in prompts
    ]
    for segments, on_layer in (((*prompts, piece), layers.append), (decoding, None), ((*decoding[:3], piece), None)):
        with gpu.phase(Phase.QUEUEING):
            queued = runner.launch(StepPlan(tuple(segments), (PageCopy(1, 2),)), on_layer)
        assert isinstance(queued, runners._Queued)
        assert queued.choices is not None
        assert (queued.choices.tokens.device, queued.choices.tokens.dtype) == (CPU, torch.int64)
        assert runner._chosen_before.device == GPU
        assert queued.layers is None or isinstance(queued.layers, LayerMarks)
    assert layers == list(range(kv.shape[0]))


def test_decoding_is_captured_with_nothing_of_the_cpu_in_it(
    gpu: FakeCuda, parts: tuple[Decoder, AttentionBackend, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attention, kv = parts
    if isinstance(attention, TritonPrefillAttention):
        pretend_graphs(gpu, monkeypatch)
        graphs = DecodeGraphs(model, attention, (1, 4), max_pages=8)
        graphs.capture()
        assert list(graphs._graphs) == [1, 4]
        runner = QueuedRunner(model, attention, kv, (7,), graphs, lambda device: Passed())
        source = random.Random(0)
        rows = tuple(Segment(n, 5 + n, [n], array("i", [n]), _spec(source)) for n in range(3))
        with gpu.phase(Phase.QUEUEING):
            runner.launch(StepPlan(rows), None)
    else:
        # What is not made for it cannot be captured, and is found out.
        with gpu.phase(Phase.CAPTURING), pytest.raises(Waits, match="in a graph"):
            attention.attend(0, query(3), decoding_batch(tiny(), GPU))


def pretend_graphs(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as far as capturing needs it."""

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device == GPU

        def wait_stream(self, other: Stream) -> None:
            assert isinstance(other, Stream)

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: gpu.phase(Phase.CAPTURING))


@pytest.mark.parametrize("page_size", [1, 16, 1024])
def test_backends_are_timed_over_long_contexts(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, page_size: int) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    problem = Problem(torch.zeros(1, 2, 2, 2, page_size, 16, device=GPU), 4, torch.float32)
    seen = list[tuple[int, int]]()

    class Plain(GatherSdpaAttention):
        def attend(self, layer: int, query: Tensor, batch: ForwardBatch, form: AttentionForm = PLAIN) -> Tensor:
            assert int(batch.context_lengths.max()) <= batch.block_tables.shape[1] * page_size
            seen.append((batch.num_tokens, int(batch.context_lengths.max())))
            return super().attend(layer, query, batch, form)

    problem.seconds({"plain": Plain(problem.kv)})
    assert seen[:2] == [(8, LONG), (2048, LONG)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "page_size"), [(FlashAttnAttention, 256), (FlashAttn3Attention, 16)])
def test_what_flash_attention_is_given(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, kind: type[GatherSdpaAttention], page_size: int, form: Any
) -> None:
    """As its C++ checks it: int32 without gaps on the GPU, and elements of a head side by side."""

    def library(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **named: Any) -> Tensor:
        for each in (*positional, *named.values()):
            if isinstance(each, Tensor):
                assert (each.device, each.dtype, each.is_contiguous()) == (GPU, torch.int32, True)
        assert all(each.stride(-1) == 1 and each.device == GPU for each in (query, key, value))
        assert key.shape[1:] == (page_size, 2, 64)
        return torch.empty_like(query)

    monkeypatch.setattr(f"{kind.__module__}._find", lambda: library)
    kv = torch.zeros(1, 6, 2, 2, page_size, 64, dtype=torch.bfloat16, device=GPU)
    attention = kind(kv)
    for batch in (prompt_batch(tiny(), GPU), decoding_batch(tiny(), GPU)):
        with gpu.phase(Phase.QUEUEING):
            mixed = attention.attend(0, query(batch.num_tokens, 64).bfloat16(), batch, form)
        assert mixed.shape == (batch.num_tokens, 4, 64)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, FLOAT8])
def test_what_flashinfer_is_told_of_types(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, kv_dtype: torch.dtype
) -> None:
    """Queries and KV have a type each."""
    told = dict[str, Any]()

    class Wrapper:
        def __init__(self, workspace: Tensor, layout: str) -> None:
            assert (workspace.dtype, workspace.device, layout) == (torch.uint8, GPU, "HND")

        def plan(self, *positional: Any, **named: Any) -> None:
            told.update(named)

        def run(self, query: Tensor, pages: Tensor) -> Tensor:
            assert (query.dtype, pages.dtype) == (told["q_data_type"], told["kv_data_type"])
            return torch.empty_like(query)

    library = ModuleType("flashinfer")
    library.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", library)
    attention = FlashInferAttention(torch.zeros(1, 6, 2, 2, 16, 64, dtype=kv_dtype, device=GPU))
    batch = decoding_batch(tiny(), GPU)
    with gpu.phase(Phase.QUEUEING):
        mixed = attention.attend(0, query(batch.num_tokens, 64).bfloat16(), batch)
    assert mixed.dtype == torch.bfloat16
    assert (told["q_data_type"], told["kv_data_type"]) == (torch.bfloat16, kv_dtype)


@pytest.mark.parametrize("kind", [FlashAttnAttention, FlashAttn3Attention, TorchVarlenAttention])
def test_kv_of_eight_bits_is_not_for_flash_attention(
    gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch, kind: type[GatherSdpaAttention]
) -> None:
    monkeypatch.setattr(f"{kind.__module__}._find", lambda: None)
    with pytest.raises(BackendUnavailable, match=r"it reads float16 and bfloat16, not torch\.float8_e4m3fn"):
        kind(torch.zeros(1, 2, 2, 2, 256, 64, dtype=FLOAT8, device=GPU))


def query(num_tokens: int, head_dim: int = 16) -> Tensor:
    return torch.zeros(num_tokens, 4, head_dim, device=GPU)


def _spec(source: random.Random, num_awaited: int = 0) -> Any:
    return random_spec(source, num_awaited)[0]


MISTAKES: dict[str, tuple[Callable[[Tensor], object], type[Exception]]] = {
    "a number is asked for": (lambda values: int(values.max()), Waits),
    "a condition": (lambda values: bool((values > 0).any()), Waits),
    "a result comes back": (lambda values: values.cpu(), Waits),
    "memory that is not pinned": (lambda values: torch.zeros(3).to(GPU, non_blocking=True), Waits),
    "a copy that blocks": (lambda values: torch.zeros(3).pin_memory().to(GPU), Waits),
    "a list": (lambda values: torch.tensor([1, 2], device=GPU), Waits),
    "an argument on the CPU": (lambda values: values + torch.zeros(3), OtherDevice),
    "an index on the CPU": (lambda values: values[torch.zeros(3, dtype=torch.int64)], OtherDevice),
    "another GPU": (lambda values: values + torch.zeros(3, device="cuda:0"), RuntimeError),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_found(gpu: FakeCuda, mistake: str) -> None:
    work, error = MISTAKES[mistake]
    values = torch.zeros(3, device=GPU)
    with gpu.phase(Phase.QUEUEING), pytest.raises(error):
        work(values)


def test_a_runner_that_asks_the_device_is_found(
    gpu: FakeCuda, parts: tuple[Decoder, AttentionBackend, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attention, kv = parts
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: logits(hidden) * float(hidden.amax()))
    runner = QueuedRunner(model, attention, kv, (7,), new_mark=lambda device: Passed())
    plan = StepPlan((Segment(1, 0, [5], array("i", [3]), _spec(random.Random(0))),))
    with gpu.phase(Phase.QUEUEING), pytest.raises((Waits, RunnerBroken), match="reads numbers back"):
        runner.launch(plan, None)
