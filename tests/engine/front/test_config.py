"""Options of an engine: what is understood, and what is refused in a line."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from services.engine.config import EngineConfig
from services.engine.loading import check_capability
from services.engine.model.linear.form import WeightForm
from services.engine.process import serve
from services.engine.replica import load_replica
from services.rpc.config import ConfigError, read_config
from services.rpc.errors import PortInUse, StartError
from tests.models import make_tiny_llama

PROG = "microserve-engine"


def read(*argv: str, **environ: str) -> EngineConfig:
    return read_config(EngineConfig, ["--model", "m", *argv], PROG, environ)


def test_labels_and_no_transfer_service() -> None:
    config = read("--labels", "zone=a", "--labels", "rack=b=c", "--kvtransfer", "none")
    assert config.label_map == {"zone": "a", "rack": "b=c"}
    assert config.kvtransfer is None


def test_the_format_follows_the_device() -> None:
    assert (read().dtype_name, read().weight_form) == ("float32", WeightForm.PACKED)
    assert (read("--dtype", "int8").dtype_name, read("--dtype", "int8").weight_form) == ("float32", WeightForm.BYTES)
    assert read("--dtype", "packed").weight_form is WeightForm.PACKED
    assert (read("--dtype", "packed16").dtype_name, read("--dtype", "packed16").weight_form) == (
        "float32",
        WeightForm.PACKED_16,
    )
    assert read("--dtype", "float32").weight_form is WeightForm.EXACT
    assert read("--device", "cuda:1").weight_form is WeightForm.EXACT
    assert read("--device", "cuda:1").dtype_name == "bfloat16"
    assert read("--device", "cuda", "--dtype", "float16").dtype_name == "float16"
    for name, form in (("int8", WeightForm.BYTES), ("fp8", WeightForm.FLOATS8)):
        config = read("--device", "cuda", "--dtype", name)
        assert (config.dtype_name, config.weight_form) == ("bfloat16", form)


def test_kv_has_the_format_of_activations_or_eight_bits() -> None:
    assert [read(*argv).kv_dtype_name for argv in ((), ("--device", "cuda"))] == ["float32", "bfloat16"]
    for argv in ((), ("--device", "cuda"), ("--device", "cuda", "--dtype", "int8"), ("--dtype", "float32")):
        assert read(*argv, "--kv-dtype", "fp8").kv_dtype_name == "float8_e4m3"
        assert read(*argv, "--kv-dtype", "fp8").dtype_name == read(*argv).dtype_name


@pytest.mark.parametrize(
    ("option", "capability"), [("--dtype fp8", (8, 6)), ("--dtype int8", (7, 5)), ("--kv-dtype fp8", (8, 6))]
)
def test_a_gpu_that_cannot_compute_a_form_is_refused(option: str, capability: tuple[int, int]) -> None:
    config = read("--device", "cuda:1", *option.split())
    with pytest.raises(StartError, match=rf"^{option} needs a GPU of compute capability \d.\d, and cuda:1 has \d.\d$"):
        check_capability(config, capability)
    check_capability(config, (9, 0))
    check_capability(read("--device", "cuda:1"), capability)


@pytest.mark.parametrize(
    "argv",
    [
        ("--pages", "0"),
        ("--page-size", "-1"),
        ("--threads", "0"),
        ("--name", "n" * 129),
        ("--kvtransfer", "nowhere"),
        ("--register", "nowhere"),
        ("--lease-default", "0"),
        ("--lease-default", "20", "--lease-max", "10"),
        ("--labels", "zone"),
        ("--dtype", "int3"),
        ("--kv-dtype", "bfloat16"),
        ("--device", "cuda", "--dtype", "packed"),
        ("--device", "cuda", "--dtype", "packed16"),
        ("--device", "cpu", "--dtype", "fp8"),
        ("--max-context", "1"),
        ("--max-message-bytes", "1048576"),
        ("--unheard-of", "1"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_refused(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=argv[-2].split("=")[0]):
        read(*argv)


def test_fault_points_are_for_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MICROSERVE_TESTING", raising=False)
    with pytest.raises(ConfigError, match="tests only"):
        read("--fault-points", "step.begin=raise")
    monkeypatch.setenv("MICROSERVE_TESTING", "1")
    assert read("--fault-points", "step.begin=raise").fault_points == ("step.begin=raise",)
    with pytest.raises(ConfigError, match="bogus"):
        read("--fault-points", "step.begin=bogus")


@pytest.mark.parametrize(
    ("num_pages", "memory_bytes"),
    [
        pytest.param(10**11, 1 << 60, id="beyond the addresses"),  # where the kernel grants whatever it can address
        pytest.param(1000, 1 << 20, id="beyond the machine"),
    ],
)
def test_a_pool_that_memory_cannot_hold_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_pages: int, memory_bytes: int
) -> None:
    folder = make_tiny_llama(tmp_path / "model", layers=1)
    replica = load_replica(read("--model", str(folder), "--pages", str(num_pages), "--threads", "1"))
    monkeypatch.setattr("services.engine.replica.machine_bytes", lambda: memory_bytes)
    with pytest.raises(StartError, match=rf"no memory for {num_pages} pages of KV, \d+ MiB"):
        replica.private_pool()


@pytest.mark.parametrize(("option", "value", "room"), [("--pages", 8, 128), ("--kv-memory-mib", 1, 4096)])
def test_a_model_of_endless_context_takes_what_its_pool_holds(
    tmp_path: Path, option: str, value: int, room: int
) -> None:
    """Tables of all its positions would take many GiB."""
    folder = make_tiny_llama(tmp_path / "model", layers=1)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 2**31 - 1}))
    replica = load_replica(read("--model", str(folder), option, str(value), "--threads", "1"))
    assert replica.limits.context_limit == replica.model.config.max_context == room


async def test_a_taken_port_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = read("--model", str(tmp_path / "none"), "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(PortInUse):
            await serve(config)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--kvtransfer", "127.0.0.1:1", "--kvtransfer-ca", "/nowhere.pem"), "cannot read /nowhere.pem"),
        (("--register", "127.0.0.1:1", "--register-ca", "/nowhere.pem"), "cannot read /nowhere.pem"),
        (("--attention", "nope"), "--attention: unknown attention backend 'nope'"),
    ],
)
async def test_what_is_wrong_is_found_before_the_model_is_loaded(
    tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    with pytest.raises(StartError, match=why):
        await serve(read("--listen", "127.0.0.1:0", "--model", str(tmp_path / "none"), *options))
