"""What tenants find of each other in the caches of real engines: nothing, and with the same bits as from scratch."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import openai
import pytest
import pytest_asyncio
from microserve.router.v1 import router_pb2 as router
from microserve.router.v1.router_pb2_grpc import RouterServiceStub
from microserve.types.v1 import sampling_pb2 as sampling

from services.cli.client import wait_serving
from services.router.salts import tenant_salt
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Suite

pytestmark = pytest.mark.slow

POLICIES = ("data_parallel", "disaggregated", "balanced:0.5", "context_aware", "adaptive")
NUM_TOKENS = 200
# With a first request that is three on two engines: one of them has had the prompt before, whichever way they went.
AGAIN = range(2)
PROMPTS = iter(mixed_prompts(40, 512, NUM_TOKENS)[10:])


@dataclass
class Doors:
    """Of a router of its own over the shared engines."""

    stub: RouterServiceStub
    http: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def doors(tiny_suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    keys = tmp_path_factory.mktemp("keys") / "tenants"
    keys.write_text("red of-red\nblue of-blue\n")
    extra = ["--admin-key", "boss", "--tenant-key-file", str(keys), "--salt-by-tenant"]
    processes = [each.process for each in tiny_suite.engines]
    process = tiny_suite.fleet.start_router(processes, "data_parallel", name="tenants", extra=extra)
    await wait_serving(process.address, 120)
    yield Doors(RouterServiceStub(tiny_suite.connect(process.address)), f"http://{process.metrics}/v1")


def fresh() -> list[int]:
    """A prompt that nobody had before."""
    return next(each for each in PROMPTS if len(each) > 100)


def call_of(prompt: Sequence[int], salt: str = "", n: int = 1) -> router.GenerateRequest:
    wanted = sampling.SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2)
    return router.GenerateRequest(tokens=router.TokenIds(ids=prompt), sampling=wanted, cache_salt=salt, n=n)


def shown(key: str, policy: str = "") -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"), ("x-microserve-policy", policy or "data_parallel"))


def found_by(answers: Sequence[router.GenerateResponse]) -> int:
    """Cached tokens that the first choice of an answer met with, on whichever engine."""
    own = [each for each in answers if not each.choice]
    return max(leg.timing.matched_token_count for each in own for leg in each.legs)


def bits(answers: Sequence[router.GenerateResponse]) -> list[bytes]:
    return [rated.SerializeToString(deterministic=True) for each in answers for rated in each.logprobs]


@pytest.mark.parametrize("policy", POLICIES)
async def test_only_ones_own_prompts_are_found(doors: Doors, policy: str) -> None:
    prompt, first = fresh(), list[bytes]()

    async def ask(key: str, salt: str = "") -> int:
        call = router.CompleteRequest(request=call_of(prompt, salt))
        answer = (await doors.stub.Complete(call, metadata=shown(key, policy), timeout=120)).response
        first.extend([] if first else bits([answer]))
        assert bits([answer]) == first
        return found_by([answer])

    assert await ask("of-red") == 0
    assert await ask("of-blue") == 0
    for salt in ("mine", tenant_salt("red", "red", "")):
        assert await ask("of-blue", salt) == 0
    for key, salt in (("of-red", ""), ("of-blue", ""), ("of-blue", "mine")):
        assert max([await ask(key, salt) for _ in AGAIN]) > 0


async def by_generate(doors: Doors, key: str, prompt: Sequence[int]) -> int:
    call = doors.stub.Generate(call_of(prompt), metadata=shown(key), timeout=120)
    return found_by([answer async for answer in call])


async def by_session(doors: Doors, key: str, prompt: Sequence[int]) -> int:
    session = doors.stub.Session(metadata=shown(key), timeout=120)
    await session.write(router.SessionRequest(generate=router.GenerateCall(request=call_of(prompt))))
    await session.done_writing()
    return found_by([output.response async for frame in session for output in frame.outputs])


async def by_choices(doors: Doors, key: str, prompt: Sequence[int]) -> int:
    call = router.CompleteRequest(request=call_of(prompt, n=3))
    return found_by([(await doors.stub.Complete(call, metadata=shown(key), timeout=120)).response])


async def by_http(doors: Doors, key: str, prompt: Sequence[int]) -> int:
    async with openai.AsyncOpenAI(base_url=doors.http, api_key=key, max_retries=0) as client:
        [model] = [each.id async for each in client.models.list()]
        answer = await client.completions.create(model=model, prompt=list(prompt), max_tokens=8)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


@pytest.mark.parametrize("door", [by_generate, by_session, by_choices, by_http])
async def test_by_whichever_door(doors: Doors, door: Callable[[Doors, str, Sequence[int]], Awaitable[int]]) -> None:
    prompt = fresh()
    assert await door(doors, "of-red", prompt) == 0
    assert await door(doors, "of-blue", prompt) == 0
    assert max([await door(doors, "of-red", prompt) for _ in AGAIN]) > 0
