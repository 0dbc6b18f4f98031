"""The sweep over policies on simulated engines: adaptive is never much worse than the best of the others."""

from __future__ import annotations

import pytest

from bench.policies.results import summary
from bench.policies.simulated import sweep
from services.router.simulate.hardware import HARDWARE, FleetHardware

STATIC = ("data_parallel", "disaggregated", "context_aware", "balanced:0.5", "migrate_then_run")


@pytest.mark.slow
@pytest.mark.parametrize("hardware", HARDWARE)
def test_adaptive_keeps_up_with_the_best_static_policy_of_each_cell(hardware: str) -> None:
    fleet = FleetHardware.alike(hardware, 2)
    mixes, loads = ("long_short", "chat", "shared_prefix"), (0.4, 0.7)
    found = summary(sweep(fleet, (*STATIC, "adaptive"), mixes, loads, requests=40, repeats=3))
    assert len(found["cells"]) == 6
    assert found["adaptive_worst_cell_upper"] >= 0.97
    assert found["adaptive_speedup_geomean"] >= 0.98
