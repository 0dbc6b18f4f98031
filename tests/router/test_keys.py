"""Keys over gRPC: which calls need one, and what is said without. test_openai_refusals.py has those over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from microserve.router.v1 import admin_pb2, router_pb2

from services.cli.access import (
    ADMIN_KEY_VARIABLE,
    CA_VARIABLE,
    CERTIFICATE_VARIABLE,
    KEY_VARIABLE,
    PRIVATE_KEY_VARIABLE,
)
from services.cli.client import router_client
from services.cli.errors import CliError
from services.cli.key_file import find_key, key_path, new_key
from services.cli.values import Question
from services.router.key_files import read_key
from services.rpc.bind import split_address
from services.rpc.errors import StartError
from services.rpc.status import remote_errors
from tests.fakes import PATIENCE_S
from tests.router.harness import UPLOAD_KEY, failing, request, running, script
from tests.router.talk import Talk

RIGHT = (("authorization", "Bearer second"),)
WRONG = [(), (("authorization", "second"),), (("authorization", "Bearer third"),), (("authorization", "Basic second"),)]


@pytest.mark.parametrize("metadata", WRONG)
async def test_calls_without_a_key_are_refused(metadata: tuple[tuple[str, str], ...]) -> None:
    async with running(1, api_key=("first", "second")) as suite:
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.stub.ListModels(router_pb2.ListModelsRequest(), metadata=metadata)
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=metadata)
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            async for _ in suite.stub.Generate(request(), metadata=metadata):
                pass
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"):
            await Talk(suite.stub, metadata).next()
        assert suite.first.called("Session") == []


async def test_who_shows_no_key_is_refused_before_its_request_is_read() -> None:
    """Else whoever knocks could have a router hold as much as it likes."""

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with running(1, api_key=("first",)) as suite, asyncio.timeout(PATIENCE_S):
        service = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.channels[0].stream_unary(f"/{service}/Complete")(never())
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.channels[0].stream_stream(f"/{service}/Generate")(never()).read()


async def test_a_client_hears_that_operators_have_keys_of_their_own() -> None:
    async with running(1, api_key=("second",), admin_key=("boss",)) as suite:
        with failing("UNAUTHENTICATED", "INVALID_API_KEY") as caught, remote_errors():
            await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=RIGHT)
        assert "no valid admin key" in caught.value.message


async def test_calls_with_a_key_pass_and_health_needs_none() -> None:
    async with running(1, api_key=("first", "second")) as suite:
        assert [piece async for piece in suite.stub.Generate(request(), metadata=RIGHT)]
        assert (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=RIGHT)).engines
        health = health_pb2_grpc.HealthStub(suite.channels[0])
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_commands_show_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(1, fake_model=script("hello"), api_key=("first", "second")) as suite:
        address = suite.router.addresses.grpc
        monkeypatch.delenv(KEY_VARIABLE, raising=False)
        with pytest.raises(CliError, match=f"API key.*{KEY_VARIABLE}"):
            async with router_client(address) as router:
                await router.list_engines()
        monkeypatch.setenv(KEY_VARIABLE, "first,second")
        async with router_client(address) as router:
            assert len(await router.list_engines()) == 1
            pieces = [piece async for piece in router.generate(Question("hi"), timeout_s=10)]
            assert "".join(piece for piece in pieces if isinstance(piece, str)) == "hello"


async def test_an_admin_key_closes_the_admin_service_to_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    client, operator = ((("authorization", f"Bearer {key}"),) for key in ("client", "operator"))
    async with running(1, fake_model=script("hello"), api_key=("client",), admin_key=("operator",)) as suite:
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=client)
        with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
            await suite.stub.ListModels(router_pb2.ListModelsRequest(), metadata=operator)
        assert (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=operator)).engines
        monkeypatch.setenv(KEY_VARIABLE, "client")
        monkeypatch.setenv(ADMIN_KEY_VARIABLE, "operator")
        async with router_client(suite.router.addresses.grpc) as router:
            assert len(await router.list_engines()) == 1
            assert [piece async for piece in router.generate(Question("hi"), timeout_s=10)]


async def test_the_admin_address_wants_the_same_keys_and_reflection_none() -> None:
    client, operator = ((("authorization", f"Bearer {key}"),) for key in ("client", "operator"))
    options = {"api_key": ("client",), "admin_key": ("operator",), "admin_listen": "127.0.0.1:0"}
    async with running(1, **options) as suite:
        for metadata in ((), client):
            with failing("UNAUTHENTICATED", "INVALID_API_KEY"), remote_errors():
                await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=metadata)
        assert (await suite.admin.ListEngines(admin_pb2.ListEnginesRequest(), metadata=operator)).engines
        for channel in suite.channels:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            [names] = [reply async for reply in stub.ServerReflectionInfo(iter([asked]))]
            assert "microserve.router.v1.AdminService" in {each.name for each in names.list_services_response.service}


async def test_the_address_for_uploads_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ADMIN_KEY_VARIABLE, raising=False)
    monkeypatch.setenv(KEY_VARIABLE, "client")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    async with running(1, takes_uploads=True, api_key=("client",)) as suite:
        address = suite.router.addresses.admin
        assert address is not None
        with pytest.raises(CliError, match="of --upload-key-file or --admin-key"):
            async with router_client(address) as router:
                await router.list_engines()
        path = key_path(split_address(address)[1])
        path.parent.mkdir(parents=True)
        path.write_text(f"{UPLOAD_KEY}\n")
        # At the door for clients that key is worth nothing, and theirs still opens it.
        for door in (address, suite.router.addresses.grpc):
            async with router_client(door) as router:
                assert len(await router.list_engines()) == 1


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines\n", b" space", "k\u00e9y".encode(), b"\xff"])
def test_a_file_without_a_key_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(StartError, match=str(path)):
        read_key(path)
    with pytest.raises(StartError, match="No such file"):
        read_key(tmp_path / "missing")


def test_a_new_key_is_for_this_users_eyes_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    key_path(7).parent.mkdir(mode=0o700)
    key_path(7).write_text("of one that was killed, and longer than any that is made now")
    key_path(7).chmod(0o644)
    with new_key(7) as path:
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_key(path) == find_key("127.0.0.1:7")
        assert 40 < len(read_key(path)) < 50
        with pytest.raises(CliError, match="another `microserve up` has --admin-port 7"), new_key(7):
            pass
        assert find_key("127.0.0.1:7") == read_key(path)
    assert find_key("127.0.0.1:7") == ""
    assert not path.exists()


@pytest.mark.parametrize("address", ["localhost:7", "[::1]:7", "10.0.0.1:7", "127.0.0.1:8"])
def test_a_key_is_shown_only_where_up_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str) -> None:
    """Somebody else may listen at the same port of ::1, which is localhost, too."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with new_key(7):
        assert find_key(address) == ""


def test_a_key_is_not_written_where_others_may_put_theirs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    key_path(7).parent.mkdir()
    key_path(7).parent.chmod(0o777)
    with pytest.raises(CliError, match="others may write"), new_key(7):
        pass


def test_without_a_home_there_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert find_key("127.0.0.1:7") == ""
    with pytest.raises(CliError, match="HOME or XDG_RUNTIME_DIR"), new_key(7):
        pass


async def test_the_commands_talk_tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("operator@example.org")
    files = {name: tmp_path / name for name in ("ca", "server", "server_key", "client", "client_key")}
    authority.cert_pem.write_to_path(files["ca"])
    for name, certificate in (("server", server), ("client", client)):
        certificate.private_key_pem.write_to_path(files[f"{name}_key"])
        certificate.cert_chain_pems[0].write_to_path(files[name])
    tls = {"tls_cert": files["server"], "tls_key": files["server_key"], "tls_client_ca": files["ca"]}
    async with running(1, **tls) as suite:
        address = suite.router.addresses.grpc

        async def list_engines() -> int:
            async with router_client(address) as router:
                return len(await router.list_engines())

        with pytest.raises(CliError, match=f"no router answers.*does it want TLS .{CA_VARIABLE}"):
            await list_engines()
        trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
        monkeypatch.setenv(CA_VARIABLE, str(tmp_path / "other.pem"))
        with pytest.raises(CliError, match=r"no router answers.*not of the authority"):
            await list_engines()
        monkeypatch.setenv(CA_VARIABLE, str(files["ca"]))
        with pytest.raises(CliError, match=f"no router answers.*a certificate .{CERTIFICATE_VARIABLE}"):
            await list_engines()
        monkeypatch.setenv(CERTIFICATE_VARIABLE, str(files["client"]))
        with pytest.raises(CliError, match="go together"):
            await list_engines()
        monkeypatch.setenv(PRIVATE_KEY_VARIABLE, str(files["client_key"]))
        assert await list_engines() == 1
        monkeypatch.setenv(CA_VARIABLE, str(tmp_path / "nowhere.pem"))
        with pytest.raises(CliError, match=r"cannot read .*nowhere\.pem"):
            await list_engines()
