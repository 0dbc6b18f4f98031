"""--salt-by-tenant: what one tenant has cached, no other can find, whatever it says and by whichever door it comes."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from microserve.router.v1 import router_pb2

from services.protocol.errors import Code
from services.router.config import RouterConfig
from services.router.salts import tenant_salt
from tests.fakes import FakeEngine, FakeError, Fault
from tests.router.harness import PROMPT, Running, model, request, running
from tests.router.openai_client import serving
from tests.router.talk import Talk, tokens

WHOLE_PAGES = 48  # of PROMPT


def shown(key: str, tenant: str = "") -> tuple[tuple[str, str], ...]:
    named = (("x-microserve-tenant", tenant),) if tenant else ()
    return (("authorization", f"Bearer {key}"), *named)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "tenants"
    path.write_text("red of-red\nred also-of-red\nblue of-blue\n")
    return {"api_key": ("gateway",), "tenant_key_file": path, "salt_by_tenant": True}


async def cached(suite: Running, key: str, tenant: str = "", **fields: object) -> int:
    """Tokens of the prompt that this client finds."""
    call = router_pb2.CompleteRequest(request=request(**fields))
    reply = await suite.stub.Complete(call, metadata=shown(key, tenant))
    assert list(reply.response.token_ids) == model().generate(PROMPT, 8)
    return reply.response.usage.cached_token_count


def salts(suite: Running) -> set[str]:
    """Of all that engines were asked."""
    calls = [message for engine in suite.engines for _, message in engine.calls]
    return {message.cache_salt for message in calls if hasattr(message, "cache_salt")}


def test_no_two_clients_have_one_salt() -> None:
    parts = ("", "a", "aa", "1:a", "1:a1:a", "0:", "red", "re", "d")
    clients = [("", tenant, salt) for tenant in parts for salt in parts]
    clients += [(owner, owner, salt) for owner in parts[1:] for salt in parts]
    made = {tenant_salt(*client) for client in clients}
    assert len(made) == len(clients)
    assert {len(salt) for salt in made} == {64}  # engines take 128 characters
    for client in clients:
        assert tenant_salt("", "", tenant_salt(*client)) not in made


async def test_each_tenant_finds_its_own(options: dict[str, object]) -> None:
    async with running(1, **options) as suite:
        clients = [("of-red", ""), ("of-blue", ""), ("gateway", ""), ("gateway", "red"), ("gateway", "blue")]
        for salt in ("", "mine"):
            for key, tenant in clients:
                assert await cached(suite, key, tenant, cache_salt=salt) == 0, (key, tenant, salt)
            for key, tenant in clients:
                assert await cached(suite, key, tenant, cache_salt=salt) == WHOLE_PAGES, (key, tenant, salt)
        assert await cached(suite, "also-of-red", "red") == WHOLE_PAGES
        for salt in salts(suite):
            assert await cached(suite, "of-blue", cache_salt=salt) == 0
        assert "" not in salts(suite)


async def test_without_it_they_share(options: dict[str, object]) -> None:
    async with running(1, **options | {"salt_by_tenant": False}) as suite:
        assert await cached(suite, "of-red") == 0
        assert await cached(suite, "of-blue") == WHOLE_PAGES
        assert salts(suite) == {""}


@pytest.mark.parametrize("policy", ["context_aware:little=4", "adaptive"])
async def test_engines_are_chosen_by_what_the_tenant_has_there(options: dict[str, object], policy: str) -> None:
    """The one with all of the other tenant's prompt is no better than any."""
    peers: dict[str, FakeEngine] = {}
    engines = [FakeEngine(model(), name, peers=peers) for name in "abcd"]
    async with running(engines=engines, policy=policy, **options) as suite:
        of_red = engines[3]
        of_red.kv.publish(PROMPT, tenant_salt("red", "red", ""))
        await suite.cached(of_red, len(PROMPT) // 4)
        assert await cached(suite, "of-blue") == 0
        assert salts(suite) == {tenant_salt("blue", "blue", "")}
        for engine in engines:
            engine.calls.clear()
        assert await cached(suite, "of-red") == WHOLE_PAGES
        assert salts(suite) == {tenant_salt("red", "red", "")}


class Lost(FakeError):
    """An engine fails."""

    code = Code.UNAVAILABLE
    reason = "ENGINE_STOPPED"


@pytest.mark.parametrize("policy", ["data_parallel", "disaggregated"])
async def test_what_goes_on_elsewhere_keeps_its_salt(options: dict[str, object], policy: str) -> None:
    async with running(3, policy=policy, **options) as suite:
        faults = [Fault(Lost("gone"), after_tokens=3, times=1) for _ in suite.engines]
        suite.first.faults["StartGenerate"], suite.engines[1].faults["StartGenerate"] = faults[:2]
        assert await cached(suite, "of-red") == 0
        assert any(fault.reached.is_set() for fault in faults)
        assert salts(suite) == {tenant_salt("red", "red", "")}


async def test_so_do_several_answers(options: dict[str, object]) -> None:
    async with running(2, policy="disaggregated", **options) as suite:
        call = router_pb2.CompleteRequest(request=request(n=4))
        reply = await suite.stub.Complete(call, metadata=shown("of-red"))
        assert len(reply.other_choices) == 3
        assert salts(suite) == {tenant_salt("red", "red", "")}


async def test_by_generate_and_by_session(options: dict[str, object]) -> None:
    async with running(1, **options) as suite:
        assert await cached(suite, "of-red") == 0
        for key, expected in (("of-blue", 0), ("of-red", WHOLE_PAGES)):
            pieces = [piece async for piece in suite.stub.Generate(request(), metadata=shown(key))]
            assert pieces[-1].usage.cached_token_count == expected
        suite.first.kv.cached.clear()
        for key, expected in (("of-red", 0), ("of-blue", 0), ("of-red", WHOLE_PAGES)):
            talk = Talk(suite.stub, shown(key))
            await talk.ask(1)
            outputs = await talk.answer(1)
            assert tokens(outputs) == model().generate(PROMPT, 8)
            assert outputs[-1].response.usage.cached_token_count == expected
            talk.call.cancel()


async def test_by_http(options: dict[str, object]) -> None:
    async with serving(key="of-red", **options) as (suite, client):
        assert await cached(suite, "of-blue") == 0
        found = []
        for prompt in ([list(PROMPT)], [list(PROMPT)], [list(PROMPT), list(PROMPT)]):
            answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=1)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            found.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert found == [0, WHOLE_PAGES, 2 * WHOLE_PAGES]
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(
                model="fake", prompt="x", max_tokens=1, extra_body={"cache_salt": "s" * 129}
            )


def test_it_needs_keys_that_name_tenants() -> None:
    with pytest.raises(ValueError, match="--salt-by-tenant needs --tenant-key-file"):
        RouterConfig(engine=("127.0.0.1:1",), api_key=("gateway",), salt_by_tenant=True)
