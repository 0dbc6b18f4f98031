"""Other processors compute the same bits as this one: their kernels, compiled and run here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from services.engine.kernels.team import team_of
from services.engine.kernels.writer import FEATURES
from services.engine.model.linear.block_linear import BlockLinear
from services.engine.model.linear.blocks import BLOCK, Blocks, blocks_of

AVX2 = "+avx,+avx2,+fma,+f16c,+sse4.1,+sse4.2,+ssse3,+sse3,+popcnt"
PROCESSORS = {
    "AVX2 with VNNI": ("haswell", f"{AVX2},+avxvnni"),
    "AVX2": ("haswell", AVX2),
    "without vectors of 8": ("x86-64", "+sse2"),
}


def digest() -> str:
    """A hash of what layers in blocks give; whole and odd shapes, one row and many."""
    random, hashed = torch.Generator().manual_seed(0), hashlib.sha256()
    for depth, columns in ((96, 112), (40, 5)):
        num_blocks = -(-depth // BLOCK)
        nibbles = Blocks(
            depth,
            torch.randint(0, 256, (columns, num_blocks, BLOCK // 2), dtype=torch.uint8, generator=random),
            torch.randn(columns, num_blocks, generator=random).to(torch.float16) * 1e-3,
            torch.randn(columns, num_blocks, generator=random).to(torch.float16),
        )
        rows = torch.randn(7, depth, generator=random)
        for blocks in (nibbles, blocks_of(torch.randn(columns, depth, generator=random))):
            for activation_bytes in (1, 2):
                layer = BlockLinear(blocks, None, team_of(1), activation_bytes)
                hashed.update(layer(rows).numpy().tobytes())
                assert torch.equal(layer(rows[2:3]), layer(rows)[2:3])
    return hashed.hexdigest()


def _runs_here(features: str) -> bool:
    return all(FEATURES.get(feature.removeprefix("+")) for feature in features.split(","))


NAMES = [name for name, (_, features) in PROCESSORS.items() if _runs_here(features)]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each of the other processors, all at work at once: they compile for seconds."""
    command = [sys.executable, "-c", f"from {__name__} import digest; print(digest())"]
    with ExitStack() as running:
        started = {}
        for name in NAMES:
            cpu, features = PROCESSORS[name]
            wanted = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
            environment = {**os.environ, **wanted, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("kernels"))}
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
            running.enter_context(process)
            running.callback(process.kill)
            started[name] = process
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_this_processor(name: str, others: dict[str, subprocess.Popen[str]]) -> None:
    said, errors = others[name].communicate(timeout=280)
    assert others[name].returncode == 0, errors
    assert said.strip() == digest()
