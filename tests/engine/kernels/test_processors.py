"""Other processors compute the same bits as this one: their kernels, compiled and run here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

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


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, features) in PROCESSORS.items() if _runs_here(features)])
def test_bits_are_those_of_this_processor(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    cpu, features = PROCESSORS[name]
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("kernels")),
    }
    command = [sys.executable, "-c", f"from {__name__} import digest; print(digest())"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest()
