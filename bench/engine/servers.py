"""The servers that are compared, each started with the same model and threads, and asked over its own API."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import grpc
from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.types.v1 import sampling_pb2

from services.cli.fleet import Fleet
from services.cli.process import ServiceProcess

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 300.0
MAX_STREAMS, MAX_CONTEXT = 32, 2048


class Server(Protocol):
    """One arm of the comparison, serving already."""

    name: str

    def generate(self, prompt: Sequence[int], output_tokens: int) -> int:
        """Tokens that came back for one greedy request; blocks. Any thread."""


class Microserve:
    """One engine of this project over gRPC."""

    def __init__(self, name: str, process: ServiceProcess, resources: ExitStack) -> None:
        self.name = name
        self.process = process
        channel = resources.enter_context(grpc.insecure_channel(process.address))
        self._stub = engine_pb2_grpc.EngineServiceStub(channel)
        self._number = 0

    def generate(self, prompt: Sequence[int], output_tokens: int) -> int:
        """See Server."""
        self._number += 1
        request = engine_pb2.StartGenerateRequest(
            owner_id="bench",
            request_id=f"{self._number}-{time.monotonic_ns()}",
            prompt_token_ids=prompt,
            sampling=sampling_pb2.SamplingParams(max_tokens=output_tokens, ignore_eos=True),
        )
        return sum(len(part.token_ids) for part in self._stub.StartGenerate(request, timeout=REQUEST_TIMEOUT_S))


class _HttpServer:
    """A server that is asked by POST of JSON."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self._port = port
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def wait_healthy(self) -> None:
        """Returns once it serves. Raises RuntimeError if it ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with code {self._process.returncode}")
            try:
                if self._exchange("GET", "/health", None)[0] == http.client.OK:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} does not serve within {START_TIMEOUT_S:.0f} s")

    def log_end(self) -> str:
        """The last lines that it wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])

    def close(self) -> None:
        """Stops it."""
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The parsed answer. Raises RuntimeError with the answer's text if it is an error."""
        status, text = self._exchange("POST", path, json.dumps(body))
        if status != http.client.OK:
            raise RuntimeError(f"{self.name}: {status} {text[:300]!r}")
        return json.loads(text)

    def _exchange(self, method: str, path: str, body: str | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


class LlamaCpp(_HttpServer):
    """llama.cpp's server on the GGUF file as it is."""

    def __init__(self, binary: str, model: Path, threads: int, folder: Path) -> None:
        port = _free_port()
        options = [
            "-m",
            str(model),
            "-t",
            str(threads),
            "-tb",
            str(threads),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        # A slot for every stream, and the batches of its defaults.
        options += ["-np", str(MAX_STREAMS), "-c", str(MAX_CONTEXT * MAX_STREAMS), "--no-webui"]
        super().__init__("llama.cpp", [binary, *options], port, folder / "llamacpp.log", {})

    def generate(self, prompt: Sequence[int], output_tokens: int) -> int:
        """See Server."""
        body = {"prompt": list(prompt), "n_predict": output_tokens, "ignore_eos": True, "temperature": 0}
        return int(self.post("/completion", {**body, "cache_prompt": False})["tokens_predicted"])


class Vllm(_HttpServer):
    """vLLM's CPU build in float32."""

    def __init__(self, binary: str, model: Path, threads: int, folder: Path) -> None:
        port = _free_port()
        options = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
        options += ["--max-model-len", str(MAX_CONTEXT), "--served-model-name", "model", "--no-enable-prefix-caching"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads)}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        environment["PATH"] = f"{Path(binary).parent}:{os.environ['PATH']}"
        super().__init__("vLLM float32", [binary, *options], port, folder / "vllm.log", environment)

    def generate(self, prompt: Sequence[int], output_tokens: int) -> int:
        """See Server."""
        body = {"model": "model", "prompt": list(prompt), "max_tokens": output_tokens, "ignore_eos": True}
        return int(self.post("/v1/completions", {**body, "temperature": 0})["usage"]["completion_tokens"])


def start_engine(fleet: Fleet, model: Path, dtype: str, threads: int, resources: ExitStack) -> Microserve:
    """An engine with a pool of its own, ready."""
    process = fleet.start_engine(f"engine-{dtype}", model, None, threads=threads, dtype=dtype)
    return Microserve(f"microserve {dtype}", process, resources)


def find(variable: str, *names: str) -> str | None:
    """The program that an environment variable names, else the first of some names on the PATH."""
    return os.environ.get(variable) or next((path for name in names if (path := shutil.which(name))), None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
