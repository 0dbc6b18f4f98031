"""The random function is Philox4x32-10, and uniform."""

from __future__ import annotations

import numpy as np
import pytest

from services.engine.sampling.philox import philox, uniforms

# Known answers published with the paper's own implementation (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def test_known_answers() -> None:
    counters, keys, expected = (np.array(column, dtype=np.uint64) for column in zip(*KNOWN, strict=True))
    assert np.array_equal(philox(counters, keys), expected)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_uniform_along_positions_and_along_seeds(vary: str) -> None:
    count, bins = 100_000, 100
    fixed, running = [7] * count, range(count)
    numbers = uniforms(fixed, running) if vary == "position" else uniforms(running, fixed)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins, (0, 1))[0]
    chi_square = ((counts - count / bins) ** 2 / (count / bins)).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom; deterministic, so it cannot flake
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


def test_a_number_depends_on_seed_and_position_only() -> None:
    seeds, positions = [1, 2**64 - 1, 1, 0], [5, 5, 2**40, 0]
    together = uniforms(seeds, positions)
    alone = [uniforms([seed], [position])[0] for seed, position in zip(seeds, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4
