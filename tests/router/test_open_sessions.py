"""How many Sessions may be open, in all and of one client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.router.config import RouterConfig
from services.router.front.sessions import client_of
from services.router.metrics import SESSIONS
from services.rpc.channel import make_channel
from services.rpc.status import RemoteError
from tests.fakes import PATIENCE_S, Fault
from tests.router.harness import PROMPT, Running, failing, model, running
from tests.router.talk import Talk, tokens

TOO_MANY = ("RESOURCE_EXHAUSTED", "TOO_MANY_SESSIONS")


def begun(suite: Running, key: str = "") -> Talk:
    """A session of which nothing is known. One that is refused may only be read: a write may come too late."""
    return Talk(suite.stub, (("authorization", f"Bearer {key}"),) if key else ())


async def opened(suite: Running, key: str = "") -> Talk:
    """A session that has been of use."""
    talk = begun(suite, key)
    await talk.ask(1)
    assert tokens(await talk.answer(1)) == model().generate(PROMPT, 8)
    return talk


async def ended(talk: Talk) -> None:
    await talk.call.done_writing()
    with pytest.raises(EOFError):
        await talk.next()


async def test_there_are_so_many_and_no_more() -> None:
    before = SESSIONS._value.get()
    async with running(1, max_sessions=2) as suite:
        first, second = await opened(suite), await opened(suite)
        assert SESSIONS._value.get() == before + 2
        for _ in range(5):
            with failing(*TOO_MANY) as caught:
                await Talk(suite.stub).next()
            assert caught.value.retry_delay_s == 1.0
        await first.ask(2)
        assert tokens(await first.answer(2)) == model().generate(PROMPT, 8)
        assert (await suite.generate()).token_ids  # other calls do not count
        await ended(first)
        third = await opened(suite)
        for talk in (second, third):
            await ended(talk)
        assert SESSIONS._value.get() == before


async def test_a_host_has_so_many_on_all_of_its_connections() -> None:
    async with running(1, max_client_sessions=1) as suite:
        await opened(suite)
        async with make_channel(suite.router.addresses.grpc) as channel:
            with failing(*TOO_MANY):
                await Talk(type(suite.stub)(channel)).next()


async def test_a_tenant_has_so_many_with_all_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "tenants"
    path.write_text("red a\nred b\nblue c\n")
    async with running(1, api_key=("d",), tenant_key_file=path, max_client_sessions=1) as suite:
        for key in "acd":
            await opened(suite, key)
        for key in "abcd":
            with failing(*TOO_MANY):
                await begun(suite, key).next()


async def test_one_that_is_cancelled_gives_its_place_back() -> None:
    async with running(1, max_sessions=1) as suite:
        suite.first.faults["StartGenerate"] = hang = Fault(times=1)
        talk = Talk(suite.stub)
        await talk.ask(1)
        await hang.reached.wait()
        talk.call.cancel()
        reason = TOO_MANY[1]
        async with asyncio.timeout(PATIENCE_S):
            while reason == TOO_MANY[1]:  # its work may take a moment to end
                reason = await outcome(suite)
        assert reason == ""


async def test_one_that_is_full_and_drains_says_that_it_drains() -> None:
    async with running(1, max_sessions=1) as suite:
        suite.first.gate.clear()
        talk = Talk(suite.stub)
        await talk.ask(1)
        await suite.first.until(lambda: suite.first.sequences)
        await suite.router._drain()
        with failing("UNAVAILABLE", "DRAINING"):
            await Talk(suite.stub).next()
        talk.call.cancel()


async def outcome(suite: Running) -> str:
    """The reason why no session can be opened, empty: one can."""
    try:
        await opened(suite)
    except RemoteError as error:
        return error.reason
    return ""


async def test_a_call_that_is_refused_takes_nobodys_place() -> None:
    async with running(1, api_key=("a",), max_sessions=1) as suite:
        for _ in range(3):
            with failing("UNAUTHENTICATED", "INVALID_API_KEY"):
                await begun(suite, "b").next()
        await opened(suite, "a")


@pytest.mark.parametrize(
    ("owner", "peer", "client"),
    [
        ("red", "ipv4:10.0.0.1:5000", "tenant red"),
        ("", "ipv4:10.0.0.1:5000", "host 10.0.0.1"),
        ("", "ipv6:%5B::1%5D:5000", "host ::/64"),
        ("", "ipv6:[2001:db8:1:2:3:4:5:6]:5000", "host 2001:db8:1:2::/64"),
        ("", "ipv6:%5Bfe80::1%25eth0%5D:5000", "host fe80::/64"),
        ("", "ipv6:%5B::ffff:10.0.0.1%5D:5000", "host 10.0.0.1"),
        ("", "ipv6:%5Bnonsense%5D:5000", "host nonsense"),
        ("", "ipv6:", "host "),
        ("", "unix:", "host "),
        ("", "unix:/run/router.sock", "host "),
    ],
)
def test_whose_a_session_is(owner: str, peer: str, client: str) -> None:
    assert client_of(owner, peer) == client


@pytest.mark.parametrize("name", ["max_sessions", "max_client_sessions"])
def test_none_at_all_is_no_limit(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be positive"):
        RouterConfig(engine=("127.0.0.1:1",), **{name: 0})  # type: ignore[arg-type]
