"""ask, engines and policy against a fake router; wrong usage of every kind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from microserve.router.v1 import admin_pb2_grpc

from services.cli.fleet import Fleet
from tests.cli.conftest import ROOT, Run


def test_ask_streams_text_as_it_is(microserve: Run, router_address: str) -> None:
    code, out, err = microserve("ask", "Hi", "--address", router_address)
    assert (code, out, err) == (0, "You said [b]Hi[/b]\n", "")


def test_ask_names_a_model_where_there_are_several(microserve: Run, router_address: str) -> None:
    assert microserve("ask", "Hi", "--model", "imaginary", "--address", router_address)[0] == 0
    code, _, err = microserve("ask", "Hi", "--model", "other", "--address", router_address)
    assert code != 0
    assert "no model 'other'" in err


def test_ask_shows_a_trace(microserve: Run, router_address: str) -> None:
    code, out, _ = microserve("ask", "Hi", "--trace", "--policy", "data_parallel", "--address", router_address)
    assert code == 0
    assert "data_parallel: 10 prompt tokens, 2 generated" in out
    row = next(line.split() for line in out.splitlines() if "remote_send" in line)
    assert row == ["remote_send", "engine-0", "[4,", "9)", "0", "5", "9", "0", "1,234,567", "12.0"]


def test_ask_prints_json(microserve: Run, router_address: str) -> None:
    code, out, _ = microserve("ask", "Hi", "--json", "--raw", "--seed", "7", "--address", router_address)
    answer = json.loads(out)
    assert code == 0
    assert (answer["text"], answer["finish_reason"]) == ("You said [b]Hi[/b]", "stop")
    assert [leg["verb"] for leg in answer["legs"]] == ["prep_recv", "remote_send", "start_generate"]
    assert answer["legs"][1]["transferred_bytes"] == 1_234_567


def test_engines_are_drained_by_name_or_address(microserve: Run, router_address: str) -> None:
    for command, said in (
        (("drain", "engine-0", "--migrate"), "engine-0 takes no new work\n"),
        (("resume", "engine-0"), "engine-0 takes work again\n"),
    ):
        assert microserve("engines", *command, "--address", router_address) == (0, said, "")
    # The fake router refuses this one with what it was asked: resume, migrate.
    code, _, err = microserve("engines", "drain", "10.0.0.9:1", "--migrate", "--address", router_address)
    assert code != 0
    assert "False True" in err
    code, out, err = microserve("engines", "drain", "engine-9", "--address", router_address)
    assert (code != 0, out) == (True, "")
    assert "no engine engine-9" in err
    code, _, err = microserve("engines", "--address", router_address, "drain", "engine-0")
    assert code != 0
    assert "behind `drain`" in err


def test_engines_come_and_go(microserve: Run, router_address: str) -> None:
    at = ("--address", router_address)
    assert microserve("engines", "add", "10.0.0.7:1", *at) == (0, "10.0.0.7:1 is in the fleet\n", "")
    assert "10.0.0.7:1" in microserve("engines", *at)[1]
    assert microserve("engines", "remove", "10.0.0.7:1", *at) == (0, "10.0.0.7:1 is out of the fleet\n", "")
    assert "10.0.0.7:1" not in microserve("engines", *at)[1]


def test_engines(microserve: Run, router_address: str) -> None:
    code, out, _ = microserve("engines", "--address", router_address)
    assert code == 0
    assert "engine-0" in out
    assert "takes no work: connection refused" in out
    code, out, _ = microserve("engines", "--json", "--address", router_address)
    first, second = json.loads(out)
    assert (first["name"], first["address"], first["pages_total"]) == ("engine-0", "10.0.0.1:1", 512)
    assert (second["healthy"], second["problem"]) == (False, "connection refused")
    assert (second["running"], second["pages_total"]) == (None, None)
    rows = microserve("engines", "--address", router_address)[1].splitlines()
    assert next(row.split() for row in rows if "10.0.0.9" in row)[-6:] == ["-"] * 6


def test_policy_list_show_set(microserve: Run, router_address: str) -> None:
    at = ("--address", router_address)
    assert "Prefill here, decode there." in microserve("policy", "list", *at)[1]
    assert microserve("policy", "show", "data_parallel", *at) == (0, '"""One engine does all."""\n', "")
    assert microserve("policy", "set", "data_parallel", *at) == (
        0,
        "data_parallel: One engine does all.\n",
        "",
    )
    listed = json.loads(microserve("policy", "list", "--json", *at)[1])
    assert {entry["name"]: entry["current"] for entry in listed} == {
        "data_parallel": True,
        "disaggregated": False,
    }
    assert json.loads(microserve("policy", "set", "disaggregated", "--json", *at)[1])["current"]
    assert json.loads(microserve("policy", "show", "--json", *at)[1])["policy"] == "disaggregated"


def test_policy_rollback_and_split(microserve: Run, router_address: str) -> None:
    at = ("--address", router_address)
    assert microserve("policy", "split", *at) == (0, "requests have not been split\n", "")
    assert microserve("policy", "rollback", *at) == (0, "data_parallel: One engine does all.\n", "")
    code, out, _ = microserve("policy", "split", "balanced:ratio=0.5=12.5", "disaggregated=3", "adaptive=0.5", *at)
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "balanced" in line)
    assert row[:6] == ["balanced:ratio=0.5", "12.5", "6", "2", "1", "25.0"]
    assert ["adaptive", "0.5", "0", "0", "0", "-", "-", "-", "-", "-"] in [line.split() for line in out.splitlines()]
    split = json.loads(microserve("policy", "split", "--end", "--json", *at)[1])
    assert (split["active"], split["arms"][1]["requests"]) == (False, {"OK": 3, "ABORTED": 1, "INVALID_ARGUMENT": 2})
    for wrong, sentence in ((("disaggregated",), "is not POLICY=PERCENT"), (("--end", "x=1"), "takes no shares")):
        code, _, err = microserve("policy", "split", *wrong, *at)
        assert (code, err.count("\n"), sentence in err) == (2, 1, True)
    microserve("policy", "set", "disaggregated", *at)


def test_planner(microserve: Run, router_address: str, tmp_path: Path) -> None:
    at = ("--address", router_address)
    assert "no planner runs (by_topic): it was stopped; at hand: by_topic" in microserve("planner", *at)[1]
    assert microserve("planner", "start", *at) == (0, "by_topic runs\n", "")
    code, out, _ = microserve("planner", *at)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert "by_topic runs for 0 s, 0 looks, moves: 1 OK" in out
    assert ["topic-1", "engine-0", "engine-1", "engine-0:512", "512", "2.50"] in rows
    assert ["topic-1", "engine-0", "engine-1", "OK", "saves", "more", "0", "512", "2.0", "40.0"] in rows
    state = json.loads(microserve("planner", "--json", *at)[1])
    assert (state["planner"], state["topics"][0]["cached_tokens"]) == ("by_topic", {"engine-0": 512})
    (tmp_path / "mine.py").write_text("async def planner(fleet):\n    pass\n")
    for wrong, sentence in (
        (("start", "nobody"), "UNKNOWN_POLICY"),
        (("start", str(tmp_path / "mine.py")), "UPLOAD_DISABLED"),
        (("start", str(tmp_path / "missing.py")), "cannot read"),
    ):
        code, _, err = microserve("planner", *wrong, *at)
        assert (code != 0, err.count("\n"), sentence in err) == (True, 1, True)
    code, _, err = microserve("planner", *at, "stop")
    assert (code, "behind `stop`" in err) == (2, True)
    assert microserve("planner", "stop", *at) == (0, "no planner runs\n", "")


def test_explain(microserve: Run, router_address: str) -> None:
    code, out, _ = microserve("explain", "r1", "--address", router_address)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["*", "balanced", "engine-0", "engine-1", "48"] in [row[:5] for row in rows]
    assert ["data_parallel", "-", "engine-0"] in [row[:3] for row in rows]
    assert ["as", "it", "was", "80.0"] in rows
    assert "weighs no placements" in microserve("explain", "plain", "--address", router_address)[1]
    explained = json.loads(microserve("explain", "r1", "--json", "--address", router_address)[1])
    assert (explained["chosen"]["jct_ms"], explained["weighed"], explained["jct_ms"]) == (70.0, 9, 80.0)
    assert len(explained["legs"]) == 3


def test_errors_of_the_router_are_one_line(microserve: Run, router_address: str, tmp_path: Path) -> None:
    at = ("--address", router_address)
    unknown = "microserve: there is no policy 'x' (NOT_FOUND, UNKNOWN_POLICY)\n"
    assert microserve("ask", "Hi", "--policy", "x", *at) == (1, "", unknown)
    assert microserve("policy", "set", "x", *at) == (1, "", unknown)
    program = tmp_path / "mine.py"
    program.write_text("async def policy(request, fleet): ...")
    code, _, err = microserve("policy", "set", str(program), *at)
    assert (code, err.count("\n")) == (1, 1)
    assert "UPLOAD_DISABLED" in err


def test_deadline_is_one_line(microserve: Run, router_address: str) -> None:
    for timeout_s in ("0.3", "3", "30"):  # the first that leaves time for the beginning of the answer
        code, out, err = microserve("ask", "wait", "--timeout", timeout_s, "--address", router_address)
        if out:
            break
    assert (code, out) == (1, "You said ")
    assert err.count("\n") == 1
    assert "did not answer in time (DEADLINE_EXCEEDED)" in err


UP = ("up", "--grpc-port", "0", "--http-port", "0")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("ask", "--nonsense", "x"), "No such option: --nonsense"),
        (("ask",), "Missing argument 'text'."),
        (("ask", "x", "--max-tokens", "0"), "Invalid value for '--max-tokens'"),
        (("nonsense",), "No such command 'nonsense'."),
        (("up", "--engines", "0"), "Invalid value for '--engines'"),
        ((*UP, "--dtype", "int4"), "microserve-engine: --dtype: 'int4' is not one of auto, packed"),
        ((*UP, "--policy", "no/such.py"), "--policy no/such.py: cannot read no/such.py: No such file"),
        ((*UP, "--policy", "balancd"), "there is no policy named 'balancd'"),
        ((*UP, "--policy", "balanced:7"), "--policy balanced:7: "),
        ((*UP, "--dtype", "fp8"), "microserve-engine: --dtype fp8 needs a GPU"),
        ((*UP, "--device", "cuda:one"), "microserve-kvtransfer: --cuda-device"),
        (("up", "--grpc-port", "65534"), "--grpc-port 65534 leaves no ports for 2 engines"),
        (("engines", "--address", "localhost"), "--address 'localhost' is not host:port"),
        (("kv", "bench", "--out", "/dev/null/x"), "--out /dev/null/x: Not a directory"),
        (("policy", "set", "no/such.py"), "cannot read no/such.py: No such file or directory"),
        (("policy", "set", "no/such.py:long=5"), "cannot read no/such.py: No such file or directory"),
        ((*UP, "--policy", f"{ROOT}/docs/examples/long_to_big.py:lang=5"), "'lang=5' is not one of its parameters"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(microserve: Run, argv: tuple[str, ...], line: str) -> None:
    code, out, err = microserve(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("microserve: ")
    assert err.count("\n") == 1
    assert line in err


def test_what_a_service_would_refuse_is_found_before_anything_starts(
    microserve: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROSERVE_ROUTER_MAX_QUEUED", "many")
    line = "microserve: microserve-router: MICROSERVE_ROUTER_MAX_QUEUED: 'many' is not a whole number\n"
    assert microserve(*UP) == (2, "", line)
    monkeypatch.delenv("MICROSERVE_ROUTER_MAX_QUEUED")
    for name, prog in (("ENGINE_PAGES", "microserve-engine"), ("KVTRANSFER_COPY_THREADS", "microserve-kvtransfer")):
        monkeypatch.setenv(f"MICROSERVE_{name}", "many")
        line = f"microserve: {prog}: MICROSERVE_{name}: 'many' is not a whole number\n"
        assert microserve(*UP) == (2, "", line)
        monkeypatch.delenv(f"MICROSERVE_{name}")
    for name in ("CERT", "KEY"):
        monkeypatch.setenv(f"MICROSERVE_TLS_{name}", "x.pem")
    code, _, err = microserve(*UP)
    assert (code, err.count("\n"), "without TLS" in err) == (2, 1, True)


def test_no_router_is_one_line_and_code_1(microserve: Run) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else can take it
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        for argv in (("ask", "Hi"), ("engines",), ("policy", "list")):
            why = "nobody listens there; start one with: microserve up"
            line = f"microserve: no router answers at {address}: {why}\n"
            assert microserve(*argv, "--address", address) == (1, "", line)


def test_the_wrong_port_is_told_from_none(microserve: Run) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        code, _, err = microserve("engines", "--address", f"127.0.0.1:{server.server_port}")
        server.shutdown()
    assert code == 1
    assert "does not speak gRPC" in err


def test_what_is_no_router_is_told(microserve: Run) -> None:
    """Such as an engine, whose port is the next one."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for argv in (("ask", "Hi"), ("engines",)):
            code, _, err = microserve(*argv, "--address", f"127.0.0.1:{port}")
            assert (code, err.count("\n")) == (1, 1)
            assert f"what answers at 127.0.0.1:{port} is no router" in err
    finally:
        server.stop(None).wait()


def test_the_admin_address_is_told_from_the_routers(microserve: Run) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    told = health.HealthServicer()
    told.set("microserve.router.v1.AdminService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin_pb2_grpc.AdminServiceServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code, _, err = microserve("ask", "Hi", "--address", f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert (code, err.count("\n")) == (1, 1)
    assert f"127.0.0.1:{port} is the router's address for administration alone (--admin-listen)" in err


@contextmanager
def asking_for_ever(address: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has begun to print an answer, which never ends."""
    command = [sys.executable, "-m", "services.cli", "ask", "wait", "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.read(8) == "You said"
        yield asking


@pytest.mark.slow
def test_a_router_that_dies_meanwhile_is_not_one_that_is_missing() -> None:
    with Fleet(package="tests.cli.fakes") as fleet:
        router = fleet.start_router([], "disaggregated")
        with asking_for_ever(router.address) as asking:
            router.kill()
            _, err = asking.communicate(timeout=60)
        assert (asking.returncode, err.count("\n")) == (1, 1)
        assert f"the router at {router.address} broke off: " in err


@pytest.mark.slow
def test_an_interrupted_command_exits_with_130(router_address: str) -> None:
    with asking_for_ever(router_address) as asking:
        asking.send_signal(signal.SIGINT)
        _, err = asking.communicate(timeout=60)
        assert (asking.returncode, err) == (130, "")


def test_port_in_use_is_found_before_anything_starts(microserve: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("--grpc-port", "--http-port", "--admin-port"):
            others = [f"{other}=0" for other in ("--grpc-port", "--http-port") if other != option]
            code, out, err = microserve("up", option, str(port), *others)
            line = f"microserve: 127.0.0.1:{port} is in use by another process: {option} takes another\n"
            assert (code, out, err) == (1, "", line)


@pytest.mark.parametrize("group", [(), ("policy",), ("model",), ("kv",)])
def test_a_group_alone_says_its_help(microserve: Run, group: tuple[str, ...]) -> None:
    assert microserve(*group) == (2, "", microserve(*group, "--help")[1])


def test_version(microserve: Run) -> None:
    assert microserve("--version") == (0, f"microserve {version('microserve')}\n", "")


def test_help_lists_the_commands(microserve: Run) -> None:
    code, out, _ = microserve("--help")
    assert code == 0
    for command in ("up", "ask", "engines", "explain", "policy", "model"):
        assert command in out
