"""Keys that say whose a request is: what their file may hold, and what they open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import openai
import pytest
from microserve.router.v1 import admin_pb2, router_pb2

from services.router.admission.admission import Admission
from services.router.admission.ticket import Ticket
from services.router.app import Router
from services.router.config import RouterConfig
from services.router.key_files import MAX_FILE_CHARACTERS, read_tenant_keys
from services.rpc.errors import StartError
from services.rpc.status import remote_errors
from tests.router.harness import failing, request, running
from tests.router.openai_client import serving
from tests.router.talk import Talk

TENANT_KEYS = "red first-red\n\nblue the-blue\nred  second-red\n"


def tenant_keys(folder: Path, lines: str = TENANT_KEYS) -> Path:
    path = folder / "tenants"
    path.write_text(lines)
    return path


@pytest.fixture
def tenants(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose each request was that asked for its turn."""
    seen: list[str] = []
    turn = Admission.turn

    def watched(admission: Admission, ticket: Ticket) -> Any:
        seen.append(ticket.tenant)
        return turn(admission, ticket)

    monkeypatch.setattr(Admission, "turn", watched)
    return seen


def shown(key: str, tenant: str = "") -> tuple[tuple[str, str], ...]:
    named = (("x-microserve-tenant", tenant),) if tenant else ()
    return (("authorization", f"Bearer {key}"), *named)


async def test_a_key_says_whose_a_request_is(tmp_path: Path, tenants: list[str]) -> None:
    async with running(1, api_key=("gateway",), tenant_key_file=tenant_keys(tmp_path)) as suite:
        for key, tenant in (("first-red", ""), ("second-red", "red"), ("the-blue", ""), ("gateway", "green")):
            assert [piece async for piece in suite.stub.Generate(request(), metadata=shown(key, tenant))]
        await suite.stub.Complete(router_pb2.CompleteRequest(request=request()), metadata=shown("gateway"))
        assert tenants == ["red", "red", "blue", "green", ""]
        with failing("PERMISSION_DENIED", "WRONG_TENANT"), remote_errors():
            await suite.stub.Complete(router_pb2.CompleteRequest(request=request()), metadata=shown("the-blue", "red"))
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.stub.Complete(router_pb2.CompleteRequest(request=request()), metadata=shown("red", "red"))


async def test_it_says_so_for_each_request_of_a_session(tmp_path: Path, tenants: list[str]) -> None:
    async with running(1, api_key=("gateway",), tenant_key_file=tenant_keys(tmp_path)) as suite:
        talk = Talk(suite.stub, shown("the-blue"))
        await talk.ask(1)
        await talk.answer(1)
        await talk.ask(2, tenant="red")
        assert await talk.error(2) == ("PERMISSION_DENIED", "WRONG_TENANT")
        await talk.ask(3, tenant="blue")
        await talk.answer(3)
        talk.call.cancel()
    assert tenants == ["blue", "blue"]


async def test_it_says_so_over_http(tmp_path: Path, tenants: list[str]) -> None:
    options = {"api_key": ("gateway",), "tenant_key_file": tenant_keys(tmp_path)}
    async with serving(key="the-blue", **options) as (_, client):
        for tenant in ("", "blue"):
            headers = {"x-microserve-tenant": tenant} if tenant else {}
            await client.completions.create(model="fake", prompt="x", max_tokens=1, extra_headers=headers)
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.completions.create(
                model="fake", prompt="x", max_tokens=1, extra_headers={"x-microserve-tenant": "red"}
            )
        assert caught.value.code == "wrong_tenant"
    assert tenants == ["blue", "blue"]


async def test_a_tenants_key_opens_no_admin_service(tmp_path: Path) -> None:
    for keys in ({"api_key": ("gateway",)}, {"admin_key": ("gateway",)}):
        async with running(1, tenant_key_file=tenant_keys(tmp_path), **keys) as suite:
            with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
                await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=shown("the-blue"))
            assert (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=shown("gateway"))).engines


def test_tenants_alone_would_leave_the_admin_service_open(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tenant-key-file needs --admin-key"):
        RouterConfig(engine=("127.0.0.1:1",), tenant_key_file=tenant_keys(tmp_path))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("red\n", "line 1 of .* must be a tenant and a key"),
        ("red a\nblue b c\n", "line 2 of .* must be a tenant and a key"),
        ("red schlüssel\n", "line 1 of .* must be a tenant and a key"),
        ("red a\nblue a\n", "the key in line 2 of .* stands there before"),
        (f"{'r' * 129} a\n", "the tenant in line 1"),
        ("red a\néquipe b\n", "line 2 of .* must be a tenant and a key of printable ASCII"),
        ("red\x7f a\n", "line 1 of .* must be a tenant and a key of printable ASCII"),
        ("", "tenants has no line"),
        (" \n\n# red a\n#red a\n", "tenants has no line"),
        ("r" * (MAX_FILE_CHARACTERS + 1), "tenants has more than"),
        ("red\0 a\n", "line 1 of .* must be a tenant and a key of printable ASCII"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, lines: str, why: str) -> None:
    with pytest.raises(StartError, match=why):
        read_tenant_keys(tenant_keys(tmp_path, lines))
    with pytest.raises(StartError, match="cannot read"):
        read_tenant_keys(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfred a\nblue b",
        b"red a\r\nblue b\r\n",
        b"# of red\nred a\n\n #red c\nblue b\n",
        b"\tred  a \n\n blue b",
        "# no lines: \u2028evil c \x85evil d \x0cevil e\nred a\nblue b".encode(),
    ],
)
def test_a_file_that_somebodys_editor_wrote_is_understood(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tenants"
    path.write_bytes(content)
    assert read_tenant_keys(path) == {"a": "red", "b": "blue"}


def test_what_never_ends_or_never_begins_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (Path("/dev/zero"), tmp_path / "fifo"):
        with pytest.raises(StartError, match="is no regular file"):
            read_tenant_keys(path)


async def test_a_key_of_a_tenant_is_nobody_elses(tmp_path: Path) -> None:
    path = tenant_keys(tmp_path)
    with pytest.raises(StartError, match="one of --api-key or --admin-key too"):
        Router(RouterConfig(engine=("127.0.0.1:1",), api_key=("the-blue",), tenant_key_file=path))
