"""Both front doors of a real suite, through clients that others wrote."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from google.protobuf import json_format
from microserve.router.v1 import router_pb2

from tests.e2e.suite import Suite, idle, wait_for_load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LOAD = ROOT / "clients" / "load"
ENOUGH = Path(__file__).with_name("enough.py")
BIN = Path(sys.executable).parent
USER: list[dict[str, str]] = [{"role": "user", "content": "Why is the sky blue?"}]


@pytest.fixture(scope="module")
def suite(tiny_suite: Suite) -> Suite:
    return tiny_suite


def url(suite: Suite) -> str:
    assert suite.router_process is not None
    return f"http://{suite.router_process.metrics}"


async def run(*command: str | Path, **environment: str) -> str:
    """What the command prints. AssertionError with it if the command fails."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "HOME": "/tmp", **environment},
    )
    try:
        async with asyncio.timeout(120):
            printed = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, printed
    return printed


async def test_the_official_openai_client(suite: Suite) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url(suite)}/v1", api_key="any", max_retries=0) as client:
        [model] = [each.id async for each in client.models.list()]
        options = {"model": model, "messages": USER, "max_tokens": 24, "seed": 3}
        whole = await client.chat.completions.create(**options, n=3, logprobs=True, top_logprobs=2)  # type: ignore[call-overload]
        assert [choice.index for choice in whole.choices] == [0, 1, 2]
        for choice in whole.choices:
            assert len(choice.logprobs.content) in range(1, 25)
            assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)
        stream = await client.chat.completions.create(**options, n=3, stream=True)  # type: ignore[call-overload]
        texts = [""] * 3
        async for piece in stream:
            texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model=model, prompt=[10**6])


async def test_an_answer_held_to_a_schema(suite: Suite) -> None:
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "red"]}}, "required": ["sky"]}
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema | {"additionalProperties": False}},
    }
    async with openai.AsyncOpenAI(base_url=f"{url(suite)}/v1", api_key="any", max_retries=0) as client:
        answer = await client.chat.completions.create(
            model="", messages=USER, max_tokens=200, temperature=0, response_format=wanted
        )  # type: ignore[call-overload]
        assert json.loads(answer.choices[0].message.content)["sky"] in ("blue", "red")
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model="",
                messages=USER,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
            )
        assert caught.value.code == "invalid_guide"


async def test_a_client_that_leaves_frees_the_engines(suite: Suite) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url(suite)}/v1", api_key="any", max_retries=0) as client:
        stream = await client.completions.create(
            model="", prompt="x", max_tokens=400, n=2, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()
    for engine in suite.engines:
        await wait_for_load(engine, idle)


async def test_locust(suite: Suite) -> None:
    printed = await run(
        *(BIN / "locust", "-f", f"{LOAD / 'locustfile.py'},{ENOUGH}", "--headless", "--host", url(suite)),
        *("--users", "4", "--spawn-rate", "4", "--stop-timeout", "60s", "--json", "--loglevel", "ERROR"),
    )
    kinds = {each["method"]: each for each in json.loads(printed[printed.index("[") :])}
    assert kinds["POST"]["num_requests"] == kinds["TTFT"]["num_requests"] > 4
    assert kinds["POST"]["num_failures"] == 0


@pytest.mark.parametrize(("script", "num_checks"), [("generate.js", 2), ("chat.js", 3)])
async def test_k6(suite: Suite, tmp_path: Path, script: str, num_checks: int) -> None:
    assert suite.router_process is not None
    summary = tmp_path / "summary.json"
    await run(
        *(BIN / "k6", "run", "--quiet", "--vus", "3", "--iterations", "12", "--no-usage-report"),
        *("--summary-export", summary, LOAD / script),
        ROUTER=url(suite) if script == "chat.js" else suite.router_process.address,
    )
    checks = json.loads(summary.read_text())["metrics"]["checks"]
    assert (checks["passes"], checks["fails"]) == (12 * num_checks, 0)


async def test_what_k6_and_ghz_send_is_of_the_contract_and_answered(suite: Suite) -> None:
    assert suite.router is not None
    for body in json.loads((LOAD / "requests.json").read_text()):
        message = json_format.ParseDict(body, router_pb2.CompleteRequest())
        assert (await suite.router.Complete(message, timeout=60)).response.usage.output_token_count > 0


async def test_grpcurl_by_reflection(suite: Suite) -> None:
    assert suite.router_process is not None
    body = {"request": {"text": "x", "n": 2, "echo": True, "sampling": {"max_tokens": 4, "ignore_eos": True}}}
    printed = await run(
        *(BIN / "grpcurl", "-plaintext", "-d", json.dumps(body), suite.router_process.address),
        "microserve.router.v1.RouterService/Complete",
    )
    reply = json_format.Parse(printed, router_pb2.CompleteResponse())
    assert reply.response.prompt.text == "x"
    assert [len(answer.token_ids) for answer in (reply.response, *reply.other_choices)] == [4, 4]
