"""Clients in other languages, built from the contracts and run against a real suite."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import pytest_asyncio
from microserve.router.v1 import router_pb2
from microserve.types.v1 import sampling_pb2

from services.router.app import Router
from services.router.config import RouterConfig
from tests.e2e.suite import Suite, start_suite
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

CLIENTS = Path(__file__).resolve().parents[2] / "clients"
# What clients/setup.sh installs, and Node.js; each by a program or file that is there only with it.
NEEDED = {
    "node": ("make", "node", "npm"),
    "go": (
        "make",
        "go",
        "protoc",
        "protoc-gen-go",
        "protoc-gen-go-grpc",
        "/usr/share/gocode/src/google.golang.org/grpc",
    ),
    "cpp": ("make", "g++", "pkg-config", "protoc", "grpc_cpp_plugin", "/usr/include/grpcpp/grpcpp.h"),
}
PROMPT, MAX_TOKENS = "The sky is", 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client left behind."""

    code: int
    text: str
    errors: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    async with start_suite(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")) as running:
        yield running


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the programs of a language, built afresh but once."""

    @cache
    def built(language: str) -> Path:
        for each in NEEDED[language]:
            if not (Path(each).exists() if each.startswith("/") else shutil.which(each)):
                pytest.skip(f"needs the {language} tool chain: {each} is absent")
        out = tmp_path_factory.mktemp(language)
        command = ["make", "-j2", "-C", CLIENTS / language, f"OUT={out}"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        return out

    return built


@pytest.fixture(scope="module", params=sorted(NEEDED))
def client(request: pytest.FixtureRequest, build: Callable[[str], Path]) -> Path:
    """The program of one language that streams an answer."""
    return build(request.param) / "client"


async def run(program: Path, *arguments: str) -> Outcome:
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    async with asyncio.timeout(90):
        text, errors = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, text.decode(), errors.decode())


async def complete(suite: Suite, prompt: str) -> router_pb2.GenerateResponse:
    asked = router_pb2.GenerateRequest(text=prompt, sampling=sampling_pb2.SamplingParams(max_tokens=MAX_TOKENS))
    assert suite.router is not None
    return (await suite.router.Complete(router_pb2.CompleteRequest(request=asked), timeout=60)).response


async def test_it_streams_what_complete_answers(suite: Suite, client: Path) -> None:
    assert suite.router_process is not None
    whole = await complete(suite, PROMPT)
    outcome = await run(client, suite.router_process.address, PROMPT, str(MAX_TOKENS))
    assert outcome.code == 0, outcome.errors
    assert outcome.text == whole.text
    usage = whole.usage
    assert f"{usage.prompt_token_count} prompt tokens, {usage.output_token_count} output tokens" in outcome.errors


async def test_it_tells_why_it_was_refused(suite: Suite, client: Path) -> None:
    assert suite.router_process is not None
    outcome = await run(client, suite.router_process.address, "", str(MAX_TOKENS))
    assert (outcome.code, outcome.text) == (1, "")
    code, _, message = outcome.errors.strip().partition(": ")
    assert code.replace("_", "").lower() == "invalidargument"
    assert "prompt" in message


async def test_it_tells_that_there_is_no_engine_yet(client: Path) -> None:
    router = Router(RouterConfig(listen="127.0.0.1:0", engine=("127.0.0.1:1",)))
    try:
        outcome = await run(client, (await router.start()).grpc, PROMPT, str(MAX_TOKENS))
    finally:
        await router.close()
    assert (outcome.code, outcome.text) == (1, "")
    assert outcome.errors.lower().startswith("unavailable: no healthy engine")


@pytest.mark.parametrize(
    "arguments", [(), ("localhost:1", "Hi"), ("localhost:1", "Hi", "many"), ("localhost:1", "Hi", "1", "2")]
)
async def test_it_says_what_it_wants_to_be_told(client: Path, arguments: tuple[str, ...]) -> None:
    assert await run(client, *arguments) == Outcome(2, "", "usage: client ADDRESS PROMPT MAX_TOKENS\n")


async def test_node_asks_many_over_one_stream(suite: Suite, build: Callable[[str], Path]) -> None:
    assert suite.router_process is not None
    prompts = [PROMPT, "One two three", ""]
    outcome = await run(build("node") / "session", suite.router_process.address, str(MAX_TOKENS), *prompts)
    assert outcome.code == 0, outcome.errors
    told = {line["prompt"]: line for line in map(json.loads, outcome.text.splitlines())}
    for prompt in prompts[:2]:
        assert told[prompt] == {"prompt": prompt, "text": (await complete(suite, prompt)).text}
    assert told[""]["error"] == "EMPTY_PROMPT"
    usage = "usage: session ADDRESS MAX_TOKENS PROMPT...\n"
    for wrong in ((), ("localhost:1", "8"), ("localhost:1", "many", "Hi")):
        assert await run(build("node") / "session", *wrong) == Outcome(2, "", usage)
