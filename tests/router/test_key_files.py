"""Files of keys that change while the router runs: from the next look on, over every door."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import openai
import pytest
from microserve.router.v1 import admin_pb2, router_pb2

from services.router import app, key_files
from services.rpc.status import RemoteError, remote_errors
from tests.fakes import PATIENCE_S
from tests.router.harness import PROMPT, UPLOAD_KEY, Running, failing, model, request, running
from tests.router.openai_client import serving
from tests.router.talk import Talk, tokens

REFUSED = ("UNAUTHENTICATED", "INVALID_API_KEY")


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at when a test says so, and need not rest: test_reloaded.py has that."""
    monkeypatch.setattr(app, "LOOK_S", 1e6)
    monkeypatch.setattr(key_files, "REST_S", 0.0)


def shown(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def put(path: Path, *lines: str) -> Path:
    """In place of what is there, at once."""
    beside = path.with_name("beside")
    beside.write_text("".join(f"{line}\n" for line in lines))
    beside.rename(path)
    return path


async def passes(suite: Running, keys: Sequence[str]) -> list[str]:
    """Those of the keys that open the door."""
    refusals = []
    for key in keys:
        call = router_pb2.CompleteRequest(request=request())
        try:
            with remote_errors():
                await suite.stub.Complete(call, metadata=shown(key))
        except RemoteError as error:
            refusals.append((key, error.reason))
    refused = [key for key, _ in refusals]
    assert refusals == [(key, REFUSED[1]) for key in refused]
    return [key for key in keys if key not in refused]


async def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    path, keys = put(tmp_path / "tenants", "red a", "blue b"), ("a", "b", "c", "")
    async with running(1, admin_key=("boss",), tenant_key_file=path) as suite:
        assert await passes(suite, keys) == ["a", "b"]
        put(path, "blue b", "green c")
        suite.router.key_looks.look()
        assert await passes(suite, keys) == ["b", "c"]
        put(path, "blue b", "blue b")
        suite.router.key_looks.look()
        assert await passes(suite, keys) == ["b", "c"]
        path.unlink()
        suite.router.key_looks.look()
        assert await passes(suite, keys) == ["b", "c"]
        put(path, "red boss", "green a")
        suite.router.key_looks.look()
        assert await passes(suite, (*keys, "boss")) == ["b", "c"]
        put(path, "green a")
        suite.router.key_looks.look()
        assert await passes(suite, keys) == ["a"]


@pytest.mark.slow
async def test_a_change_counts_by_itself_once_the_file_has_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks meanwhile, and half a file counts for nothing."""
    monkeypatch.undo()
    path, keys = put(tmp_path / "tenants", "red a", "blue b"), ("a", "b", "c", "")
    async with running(1, admin_key=("boss",), tenant_key_file=path) as suite:
        path.rename(tmp_path / "aside")
        path.write_text("red a\n")
        assert await passes(suite, keys) == ["a", "b"]
        path.write_text("red a\ngreen c\n")
        async with asyncio.timeout(PATIENCE_S):
            # The keys of one look are asked in turn, and the file may count between two of them.
            while "c" not in await passes(suite, keys):
                pass
        assert await passes(suite, keys) == ["a", "c"]


async def test_an_open_session_ends_once_its_key_is_gone(tmp_path: Path) -> None:
    path = put(tmp_path / "tenants", "red a", "blue b")
    async with running(1, admin_key=("boss",), tenant_key_file=path) as suite:
        talk = Talk(suite.stub, shown("a"))
        suite.first.gate.clear()
        await talk.ask(1, request(max_tokens=50))
        await suite.first.until(lambda: suite.first.sequences)
        put(path, "blue b")
        suite.router.key_looks.look()
        await talk.ask(2)
        assert await talk.error(2) == REFUSED
        suite.first.gate.set()
        # What had begun is answered.
        assert (await talk.answer(1))[-1].response.usage.output_token_count == 50
        with failing(*REFUSED):
            await talk.next()


async def test_who_has_lost_its_key_leaves_its_place_to_others(tmp_path: Path) -> None:
    path = put(tmp_path / "tenants", "red a", "blue b")
    async with running(1, admin_key=("boss",), tenant_key_file=path, max_sessions=1) as suite:
        talk = Talk(suite.stub, shown("a"))
        await talk.ask(1)
        await talk.answer(1)
        put(path, "blue b")
        suite.router.key_looks.look()
        await talk.ask(2)
        assert await talk.error(2) == REFUSED
        with failing(*REFUSED):
            await talk.next()
        other = Talk(suite.stub, shown("b"))
        await other.ask(1)
        assert tokens(await other.answer(1)) == model().generate(PROMPT, 8)
        other.call.cancel()


async def test_a_key_that_changes_hands_counts_for_whom_it_then_names(tmp_path: Path) -> None:
    path = put(tmp_path / "tenants", "red a", "blue b")
    async with running(1, admin_key=("boss",), tenant_key_file=path) as suite:
        talk = Talk(suite.stub, shown("a"))
        await talk.ask(1, tenant="red")
        await talk.answer(1)
        put(path, "blue a")
        suite.router.key_looks.look()
        await talk.ask(2, tenant="red")
        assert await talk.error(2) == ("PERMISSION_DENIED", "WRONG_TENANT")
        await talk.ask(3)
        assert tokens(await talk.answer(3)) == model().generate(PROMPT, 8)
        talk.call.cancel()


async def test_a_new_session_wants_a_key_that_counts(tmp_path: Path) -> None:
    path = put(tmp_path / "tenants", "red a", "blue b")
    async with running(1, admin_key=("boss",), tenant_key_file=path) as suite:
        put(path, "blue b")
        suite.router.key_looks.look()
        with failing(*REFUSED):
            await Talk(suite.stub, shown("a")).next()


async def test_over_http_the_same_connection_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "tenants", "red a")
    async with serving(key="a", admin_key=("boss",), tenant_key_file=path) as (suite, client):
        await client.completions.create(model="fake", prompt="x", max_tokens=1)
        put(path, "red b")
        suite.router.key_looks.look()
        with pytest.raises(openai.AuthenticationError):
            await client.completions.create(model="fake", prompt="x", max_tokens=1)


async def test_the_key_of_the_upload_port_changes_too() -> None:
    async with running(1, takes_uploads=True) as suite:
        path = suite.router.config.upload_key_file
        assert path is not None
        await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
        put(path, "another")
        suite.router.key_looks.look()
        with failing(*REFUSED), remote_errors():
            await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
        put(path, UPLOAD_KEY)
        suite.router.key_looks.look()
        await suite.admin.ListEngines(admin_pb2.ListEnginesRequest())
