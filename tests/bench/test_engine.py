"""The engine beside its peers: what the figures are called, what is left out, and a real engine under small loads."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.engine import load
from bench.engine.__main__ import _chosen, _peers, _ratios
from bench.engine.load import SCENARIOS, Rates, Scenario, measure, outside_model_share
from bench.engine.servers import start_engine
from services.cli.fleet import Fleet
from tests.models import make_tiny_llama

LOADS = ("one_stream", "batch16", "batch32", "prefill")
OURS = {name: SimpleNamespace(name=f"microserve {name}") for name in ("packed", "float32")}


def rates_of(**by_server: float) -> Rates:
    """Each server's rate, ten times as high under each load than under the one before."""
    names = {"packed": "microserve packed", "float32": "microserve float32", "llamacpp": "llama.cpp"}
    names["vllm"] = "vLLM float32"
    return {
        (names[server], scenario): rate * 10**place
        for server, rate in by_server.items()
        for place, scenario in enumerate(SCENARIOS)
    }


def test_ratios_are_of_the_default_and_of_equal_precision() -> None:
    rates = rates_of(packed=6.0, float32=4.0, llamacpp=3.0, vllm=2.0)
    rates["vLLM float32", SCENARIOS[-1]] *= 4
    assert _ratios(rates, OURS, SCENARIOS) == {
        **{f"{name}_over_llamacpp": 2.0 for name in LOADS},
        **{f"{name}_over_vllm": 3.0 for name in LOADS[:-1]},
        "prefill_over_vllm": 0.75,
        "float32_over_vllm_min": 0.5,
    }


def test_what_is_not_there_has_no_key() -> None:
    assert _ratios(rates_of(packed=1.0, float32=1.0), OURS, SCENARIOS) == {}
    assert set(_ratios(rates_of(packed=1.0, llamacpp=1.0), {"packed": OURS["packed"]}, SCENARIOS[:1])) == {
        "one_stream_over_llamacpp"
    }


def test_what_is_not_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("LLAMA_SERVER", "VLLM"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with ExitStack() as resources:
        assert _peers({"llamacpp", "vllm"}, tmp_path, tmp_path, 1, resources) == []
    told = capsys.readouterr().out
    assert "llama.cpp's server is not installed" in told
    assert "vLLM is not installed" in told


def test_one_that_does_not_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "llama-server"
    broken.write_text("#!/bin/sh\necho out of luck; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(broken))
    with ExitStack() as resources:
        assert _peers({"llamacpp"}, tmp_path, tmp_path, 1, resources) == []
    told = capsys.readouterr().out
    assert "llama.cpp ended with code 3" in told
    assert "out of luck" in told


def test_unknown_servers_and_loads_are_refused() -> None:
    assert _chosen("--loads", "prefill, batch16", LOADS) == {"prefill", "batch16"}
    with pytest.raises(Exception, match="'batch17' is none of"):
        _chosen("--loads", "prefill,batch17", LOADS)


@pytest.mark.slow
def test_a_real_engine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "TOKEN_IDS", range(3, 500))
    scenario = Scenario("small", "3 streams, 9 in, 5 out", 3, 9, 5)
    with ExitStack() as resources:
        fleet = resources.enter_context(Fleet())
        server = start_engine(fleet, make_tiny_llama(tmp_path), "float32", 1, resources)
        rates = measure([server], [scenario], 1)
        assert set(rates) == {("microserve float32", scenario)}
        assert rates["microserve float32", scenario] > 0
        assert 0 < outside_model_share(server) < 1
