"""Who computes what is large: a team of our own, and torch beside it on one thread, or torch by itself on all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from services.engine.config import EngineConfig
from services.engine.replica import load_replica
from tests.engine.model.random_models import save_random
from tests.models import make_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NATIVE, FOREIGN = "llama", "gpt-neox"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_llama(folder / NATIVE)
    save_random(folder / FOREIGN, "GPTNeoXConfig", {})
    return folder


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("model", "dtype", "kv_dtype", "num_torch_threads"),
    [
        (NATIVE, "auto", "auto", 1),
        (NATIVE, "float32", "auto", 1),
        (NATIVE, "auto", "fp8", 1),
        (NATIVE, "bfloat16", "auto", 3),
        (FOREIGN, "auto", "auto", 1),
        (FOREIGN, "bfloat16", "auto", 3),
    ],
)
def test_torch_has_one_thread_beside_a_team(
    models: Path, model: str, dtype: str, kv_dtype: str, num_torch_threads: int
) -> None:
    """Two sets of threads that look for work slow each other: docs/engine.md has the figures."""
    load_replica(EngineConfig(model=str(models / model), dtype=dtype, kv_dtype=kv_dtype, threads=3, pages=8))
    with ThreadPoolExecutor(1) as loop_thread:  # one that begins after the model is loaded, as the engine's does
        assert loop_thread.submit(torch.get_num_threads).result() == num_torch_threads
