"""`microserve up` with the real model: a person's question answered over two engine processes, and nothing left."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub
from microserve.router.v1 import router_pb2 as router
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from microserve.types.v1 import sampling_pb2 as sampling

from tests.cli.launched import alive, wait_dead
from tests.e2e.suite import load
from tests.faults.gates import StepGate

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

# What float32 says. Its first word is a close thing: one of a French answer is 0.08 behind, in logits.
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
POLICIES = ("data_parallel", "disaggregated", "balanced:0.1", "balanced:0.5", "context_aware", "adaptive")


class Launcher:
    """A running `microserve up --json` with free ports."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Its temporary files go below `folder`."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "up", "--grpc-port=0", "--http-port=0", "--json", *options],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "TMPDIR": str(folder)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoints: list[dict[str, Any]] = self.read("ready")["endpoints"]
        self.answer = self.read("answer")

    def kill(self, name: str) -> None:
        """Kills a service."""
        (pid,) = (endpoint["pid"] for endpoint in self.endpoints if endpoint["name"] == name)
        os.kill(pid, signal.SIGKILL)

    def replaced(self, name: str) -> None:
        """Returns when another has taken the place of a killed service."""
        assert self.read("restarting")["name"] == name
        self.endpoints = self.read("ready")["endpoints"]

    def read(self, event: str) -> dict[str, Any]:
        """The next event, which must be the one named."""
        assert self.process.stdout is not None
        line: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        assert line.get("event") == event
        return line


@contextmanager
def launched(folder: Path, *options: str) -> Iterator[Launcher]:
    """Kills the launcher at the end if it still runs; its lifeline takes the rest."""
    before = shared_memory()
    launcher = Launcher(folder, *options)
    with launcher.process:
        try:
            yield launcher
        finally:
            launcher.process.kill()
    wait_dead([endpoint["pid"] for endpoint in launcher.endpoints])
    assert shared_memory() <= before


def shared_memory() -> set[str]:
    """Files of shared memory and semaphores on this machine."""
    return set(os.listdir("/dev/shm"))


def test_question_is_answered_over_two_engines_and_a_signal_leaves_nothing(tmp_path: Path) -> None:
    with launched(tmp_path, "--ask", QUESTION) as launcher:
        answer = launcher.answer
        assert answer["text"] == ANSWER
        assert answer["policy"] == "disaggregated"
        prepare, send, generate = answer["legs"]
        assert [leg["verb"] for leg in answer["legs"]] == ["prep_recv", "remote_send", "start_generate"]
        assert send["engine"] != prepare["engine"] == generate["engine"]
        end = answer["prompt_tokens"] - 1
        assert (send["computed"], send["transferred"], generate["computed"]) == (end, end, 1)
        # 30 layers, K and V, 3 heads of 64 float32 values.
        assert send["transferred_bytes"] == end * 30 * 2 * 3 * 64 * 4
        launcher.process.send_signal(signal.SIGTERM)
        launcher.read("stopping")
        assert launcher.process.wait(120) == 0
        assert not any(alive(endpoint["pid"]) for endpoint in launcher.endpoints)
    assert list(tmp_path.iterdir()) == []


def test_a_program_is_swapped_in_at_the_admin_port(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("keys")))
    # Fixed, as a person gives it, and below the ports that the kernel hands out.
    port = 29_000 + os.getpid() % 1000
    options = (f"--admin-port={port}", "--engines=1", "--ask", "Hello")
    program = ROOT / "docs/examples/long_to_big.py"
    with launched(tmp_path, *options) as launcher:
        [router] = [endpoint["grpc"] for endpoint in launcher.endpoints if endpoint["name"] == "router"]
        refused = command("policy", "set", str(program), "--address", router)
        assert refused.returncode != 0
        assert "--admin-port" in refused.stderr
        to_admin_port = ("policy", "set", str(program), "--address", f"127.0.0.1:{port}")
        with monkeypatch.context() as another_user:
            another_user.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("other")))
            refused = command(*to_admin_port)
            assert refused.returncode != 0
            assert "UNAUTHENTICATED" in refused.stderr
        assert command(*to_admin_port).returncode == 0
        answer = command("ask", "Hello", "--max-tokens=1", "--json", "--address", router)
        assert json.loads(answer.stdout)["policy"] == "long_to_big"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`microserve` with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_the_answer_is_that_of_float32_on_every_path(tmp_path: Path) -> None:
    """Cold, on a prefix hit, beside others, and wherever its prompt was computed."""
    with launched(tmp_path, "--ask", "Hello") as launcher:
        (address,) = (endpoint["grpc"] for endpoint in launcher.endpoints if endpoint["name"] == "router")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = RouterServiceStub(channel)

            async def ask(text: str, policy: str, salt: str) -> str:
                request = router.GenerateRequest(sampling=sampling.SamplingParams(max_tokens=24), cache_salt=salt)
                request.chat.messages.add(role="user", content=text)
                metadata = (("x-microserve-policy", policy),)
                reply = await stub.Complete(
                    router.CompleteRequest(request=request), timeout=120, metadata=metadata, wait_for_ready=True
                )
                return reply.response.text

            for policy in POLICIES:
                cold = await ask(QUESTION, policy, policy)
                others = [ask(f"Tell me about the number {number}.", policy, policy) for number in range(5)]
                shared = await asyncio.gather(
                    ask(QUESTION, policy, policy), ask(QUESTION, policy, f"{policy} again"), *others
                )
                assert [cold, *shared[:2]] == [ANSWER] * 3, policy
                assert all(shared[2:])


@pytest.mark.faults
def test_killed_launcher_leaves_no_process_and_no_shared_memory(tmp_path: Path) -> None:
    with launched(tmp_path, "--ask", "Hello") as launcher:
        launcher.process.kill()
        wait_dead([endpoint["pid"] for endpoint in launcher.endpoints])


@pytest.mark.faults
async def test_killed_services_come_back_and_streams_go_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine that decodes in the middle of a stream, the transfer service, the router: whoever asks afterwards is
    answered over both engines again."""
    # Before the steps of both engines, of which one steps at a time.
    steps = StepGate(tmp_path_factory.mktemp("gates") / "step")
    monkeypatch.setenv("MICROSERVE_TESTING", "1")
    monkeypatch.setenv("MICROSERVE_ENGINE_FAULT_POINTS", steps.options[1])
    with launched(tmp_path, "--ask", "Hello") as launcher:
        (address,) = (endpoint["grpc"] for endpoint in launcher.endpoints if endpoint["name"] == "router")
        async with grpc.aio.insecure_channel(address) as channel:
            stub = RouterServiceStub(channel)
            expected, _ = await answer_of(pieces_of(stub, "data_parallel", "whole"))
            with steps.closed() as gate:
                pieces = pieces_of(stub, "disaggregated", "broken")
                first = await gate.until(anext(pieces))
                name = await gate.until(running(launcher))
                launcher.kill(name)
            await asyncio.to_thread(launcher.replaced, name)
            rest, legs = await answer_of(pieces)
            assert [*first.token_ids, *rest] == expected
            generated = [leg.engine for leg in legs if leg.verb == sampling.VERB_START_GENERATE]
            assert generated == [name, *({"engine-0", "engine-1"} - {name})]
            for name in ("kvtransfer", "router"):
                launcher.kill(name)
                await asyncio.to_thread(launcher.replaced, name)
                await both_engines(stub)
                assert (await answer_of(pieces_of(stub, "disaggregated", name)))[0] == expected
        launcher.process.send_signal(signal.SIGTERM)
        launcher.read("stopping")
        assert launcher.process.wait(120) == 0


async def pieces_of(stub: RouterServiceStub, policy: str, salt: str) -> AsyncGenerator[router.GenerateResponse, None]:
    """Of one long answer, as they come, from the first with a token on."""
    request = router.GenerateRequest(cache_salt=salt, sampling=sampling.SamplingParams(max_tokens=200, ignore_eos=True))
    request.chat.messages.add(role="user", content=QUESTION)
    call = stub.Generate(request, timeout=240, metadata=(("x-microserve-policy", policy),), wait_for_ready=True)
    has_begun = False
    async for piece in call:
        has_begun |= bool(piece.token_ids)
        if has_begun:
            yield piece


async def answer_of(pieces: AsyncGenerator[router.GenerateResponse, None]) -> tuple[list[int], list[sampling.Leg]]:
    """Its tokens and what the router called for it."""
    tokens: list[int] = []
    legs: list[sampling.Leg] = []
    async for piece in pieces:
        tokens.extend(piece.token_ids)
        legs.extend(piece.legs)
    return tokens, legs


async def running(launcher: Launcher) -> str:
    """Name of the engine that runs a sequence, once the other runs none."""
    async with AsyncExitStack() as stack:
        engines = {
            endpoint["name"]: EngineServiceStub(
                await stack.enter_async_context(grpc.aio.insecure_channel(endpoint["grpc"]))
            )
            for endpoint in launcher.endpoints
            if endpoint["name"].startswith("engine-")
        }
        while True:
            busy = [name for name, stub in engines.items() if (await load(stub)).running_sequence_count]
            if len(busy) == 1:
                return busy[0]
            await asyncio.sleep(0.05)


async def both_engines(stub: RouterServiceStub) -> None:
    """Waits until the router has KV moved between the engines."""
    metadata = (("x-microserve-policy", "disaggregated"),)
    async with asyncio.timeout(120):
        for number in itertools.count():
            request = router.GenerateRequest(text=QUESTION, sampling=sampling.SamplingParams(max_tokens=1))
            request.cache_salt = f"move {number}"
            asked = router.CompleteRequest(request=request)
            try:
                reply = await stub.Complete(asked, timeout=60, metadata=metadata, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            else:
                if len(reply.response.legs) == 3:
                    return
            await asyncio.sleep(0.1)
