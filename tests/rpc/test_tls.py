"""TLS and mTLS with certificates made on the spot."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc import tls as tls_module
from services.rpc.channel import make_channel
from services.rpc.errors import StartError
from services.rpc.reloaded import Reloaded
from services.rpc.server import Server, ServerConfig
from services.rpc.tls import ClientTls, ServerTls, check_client
from tests.fakes import PATIENCE_S
from tests.rpc.conftest import SERVICE, Running, Serve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEM files: ca, and cert and key of a server, a client and a client of another CA."""
    folder = tmp_path_factory.mktemp("pki")
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, issuer in (("server", authority), ("client", authority), ("stranger", other)):
        certificate = issuer.issue_cert("127.0.0.1" if name == "server" else f"{name}@example.org")
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(folder / f"{name}.pem", append=True)
    return {path.name: path for path in folder.iterdir()}


async def check(running: Any) -> None:
    await health_pb2_grpc.HealthStub(running.channel).Check(
        health_pb2.HealthCheckRequest(service="grpc.health.v1.Health"), timeout=10
    )


async def refused(running: Any) -> bool:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(running)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tls_proves_the_server(serve: Serve, pki: dict[str, Path]) -> None:
    running = await serve(tls=ClientTls(ca=pki["ca.pem"]), tls_cert=pki["server.pem"], tls_key=pki["server.key"])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(running)
    # Through the handshake, and answered by the service itself.
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("who", ["client", "stranger", None])
async def test_mtls_lets_in_only_clients_of_the_ca(serve: Serve, pki: dict[str, Path], who: str | None) -> None:
    tls = ClientTls(
        ca=pki["ca.pem"],
        cert=pki[f"{who}.pem"] if who else None,
        key=pki[f"{who}.key"] if who else None,
    )
    running = await serve(tls=tls, tls_cert=pki["server.pem"], tls_key=pki["server.key"], tls_client_ca=pki["ca.pem"])
    assert await refused(running) is (who != "client")


def install(authority: trustme.CA, folder: Path, names: Sequence[str] = ("ca.pem", "server.pem", "server.key")) -> None:
    """Puts files of one authority in the place of those that are there, each whole or not at all. The certificate is
    good for a server at 127.0.0.1 and for its clients."""
    certificate = authority.issue_cert("127.0.0.1")
    pems = {
        "ca.pem": authority.cert_pem.bytes(),
        "server.pem": b"".join(blob.bytes() for blob in certificate.cert_chain_pems),
        "server.key": certificate.private_key_pem.bytes(),
    }
    for name in names:
        (folder / "new").write_bytes(pems[name])
        os.replace(folder / "new", folder / name)


def mutual(folder: Path) -> dict[str, Any]:
    """Options of a server that shows, and asks for, certificates of the folder."""
    return {"tls_cert": folder / "server.pem", "tls_key": folder / "server.key", "tls_client_ca": folder / "ca.pem"}


def client(folder: Path) -> ClientTls:
    return ClientTls(ca=folder / "ca.pem", cert=folder / "server.pem", key=folder / "server.key")


def server(folder: Path) -> ServerTls:
    return ServerTls(cert=folder / "server.pem", key=folder / "server.key", client_ca=folder / "ca.pem")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A server's and a client's, with files of one authority."""
    authority = trustme.CA()
    for name in ("server", "client"):
        (tmp_path / name).mkdir()
        install(authority, tmp_path / name)
    return tmp_path / "server", tmp_path / "client"


async def watch(running: Running) -> Any:
    """A call that is under way, and has been answered once."""
    request = health_pb2.HealthCheckRequest(service="")
    call = health_pb2_grpc.HealthStub(running.channel).Watch(request)
    await call.read()
    return call


async def test_replaced_certificates_are_used_without_a_restart(serve: Serve, folders: tuple[Path, Path]) -> None:
    """By the server and by a channel that is open. What was connected goes on."""
    of_server, of_client = folders
    running = await serve(tls=client(of_client), **mutual(of_server))
    assert not await refused(running)
    under_way = await watch(running)
    other = trustme.CA()
    install(other, of_server)
    assert not await refused(running)  # over the connection that there is
    assert await refused_anew(running, of_client)  # neither trusts the other any more
    install(other, of_client, ["ca.pem"])
    assert await refused_anew(running, of_client)  # nor does the server trust the client
    install(other, of_client)
    assert not await refused(running)  # over a new connection
    await running.server.set_serving(SERVICE, True)
    assert (await under_way.read()).status == health_pb2.HealthCheckResponse.SERVING
    under_way.cancel()


async def refused_anew(running: Running, folder: Path) -> bool:
    """Whether a client with these files cannot connect."""
    async with make_channel(running.server.bound, client(folder)) as channel:
        return await refused(Running(running.server, channel, None))


@pytest.mark.parametrize("grace", [None, 0.01])
async def test_close_ends_calls_from_before_a_replacement(
    serve: Serve, folders: tuple[Path, Path], grace: float | None
) -> None:
    running, under_way = await replaced_under(serve, folders)
    async with asyncio.timeout(PATIENCE_S):
        await running.channel.close(grace)
    assert under_way.cancelled()


async def test_calls_from_before_a_replacement_have_the_grace_too(serve: Serve, folders: tuple[Path, Path]) -> None:
    running, under_way = await replaced_under(serve, folders)
    closing = asyncio.create_task(running.channel.close(PATIENCE_S))
    await running.server.set_serving(SERVICE, True)
    assert (await under_way.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert not closing.done()
    under_way.cancel()
    await closing


async def replaced_under(serve: Serve, folders: tuple[Path, Path]) -> tuple[Running, Any]:
    """A call under way over one connection, while the channel has another with new certificates."""
    of_server, of_client = folders
    running = await serve(tls=client(of_client), **mutual(of_server))
    under_way = await watch(running)
    other = trustme.CA()
    install(other, of_server)
    install(other, of_client)
    assert not await refused(running)
    return running, under_way


async def test_half_a_replacement_changes_nothing(
    serve: Serve, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "services.rpc.reloaded")
    of_server, of_client = folders
    running = await serve(tls=client(of_client), **mutual(of_server))
    other = trustme.CA()
    install(other, of_server, ["server.pem"])
    install(other, of_client, ["server.pem"])
    assert not await refused_anew(running, of_client)
    assert not await refused_anew(running, of_client)
    assert caplog.text.count("certificates stay as they were") == 2  # server and client, once each
    (of_server / "server.key").unlink()
    assert not await refused_anew(running, of_client)
    install(other, of_server)
    install(other, of_client)
    assert not await refused_anew(running, of_client)
    assert caplog.text.count("certificates replaced") == 2


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
    """The client's end after a first byte of the server's. ssl.SSLError of the end that refuses first."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1", session=session)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    under_way = [near, far]
    while under_way:
        for end in tuple(under_way):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            under_way.remove(end)
    far.write(b"x")
    assert near.read(1) == b"x"  # tickets come before it
    return near


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_no_session_outlives_the_authority_that_let_it_in(folders: tuple[Path, Path], version: ssl.TLSVersion) -> None:
    of_server, of_client = folders
    serving, calling = server(of_server).context(), client(of_client).context()
    calling.maximum_version = version
    session = handshake(serving, calling).session
    assert not handshake(serving, calling, session).session_reused
    install(trustme.CA(), of_server, ["ca.pem"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(serving, calling, session)


async def test_roots_may_hold_the_issuing_authority_alone(serve: Serve, tmp_path: Path) -> None:
    install(trustme.CA().create_child_ca(), tmp_path)
    handshake(server(tmp_path).context(), client(tmp_path).context())
    assert not await refused(await serve(tls=client(tmp_path), **mutual(tmp_path)))


def test_a_file_that_is_away_for_a_moment_is_looked_at_again(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when it goes after it has been read, and comes back as it was."""
    path, aside, read = folders[1] / "ca.pem", folders[1] / "aside", tls_module._read

    def read_and_lose(path: Path) -> bytes:
        content = read(path)
        path.rename(aside)
        return content

    certificates = Reloaded([path], ClientTls(path).context)
    before = certificates.latest()
    install(trustme.CA(), folders[1], ["ca.pem"])
    with monkeypatch.context() as patched:
        patched.setattr(tls_module, "_read", read_and_lose)
        assert certificates.latest() is before
    assert caplog.text.count("certificates stay as they were") == 1
    aside.rename(path)
    assert certificates.latest() is not before


def test_what_fails_in_another_way_is_tried_again(tmp_path: Path) -> None:
    path, makes = tmp_path / "file", iter([1, MemoryError(), 2])

    def make() -> int:
        made = next(makes)
        if isinstance(made, MemoryError):
            raise made
        return made

    numbers = Reloaded([path], make)
    path.touch()
    with pytest.raises(MemoryError):
        numbers.latest()
    assert numbers.latest() == 2


async def test_missing_file_is_one_sentence(pki: dict[str, Path], tmp_path: Path) -> None:
    config = ServerConfig(tls_cert=tmp_path / "no.pem", tls_key=pki["server.key"], metrics_port=None)
    with pytest.raises(StartError, match=r"cannot read .*no\.pem: No such file"):
        await Server(config, "engine").start()


ENCRYPTED = serialization.BestAvailableEncryption(b"secret")
NO_PAIR = "are no certificate with its private key"


@pytest.fixture(scope="module")
def wrong(pki: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same files and others that are none."""
    folder = tmp_path_factory.mktemp("wrong")
    key = serialization.load_pem_private_key(pki["server.key"].read_bytes(), None)
    (folder / "locked.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, ENCRYPTED)
    )
    (folder / "words.pem").write_text("no PEM at all\n")
    return {**pki, **{path.name: path for path in folder.iterdir()}, "nowhere.pem": folder / "nowhere.pem"}


@pytest.mark.parametrize(
    ("cert", "key", "ca", "why"),
    [
        ("server.pem", "client.key", None, f"server.pem and .*client.key {NO_PAIR}: key values mismatch"),
        ("server.pem", "locked.key", None, NO_PAIR),
        ("words.pem", "server.key", None, NO_PAIR),
        ("server.pem", "server.pem", None, NO_PAIR),
        ("nowhere.pem", "server.key", None, "cannot read .*nowhere.pem: No such file"),
        ("server.pem", "server.key", "words.pem", "words.pem holds no certificates"),
        ("server.pem", "server.key", "server.key", "server.key holds no certificates"),
        ("server.pem", "server.key", "nowhere.pem", "cannot read .*nowhere.pem: No such file"),
    ],
)
async def test_files_that_are_wrong_are_named_before_anything_is_begun(
    wrong: dict[str, Path], cert: str, key: str, ca: str | None, why: str
) -> None:
    config = ServerConfig(
        metrics_port=None, tls_cert=wrong[cert], tls_key=wrong[key], tls_client_ca=wrong[ca] if ca else None
    )
    with pytest.raises(StartError, match=why):
        Server(config, "engine").check()
    with pytest.raises(StartError, match=why):
        check_client(ClientTls(wrong[ca] if ca else None, wrong[cert], wrong[key]))
    with pytest.raises(StartError, match=why):  # as HTTP and the data port are served
        ServerTls(wrong[cert], wrong[key], wrong[ca] if ca else None).context()


def test_files_that_are_right_are(pki: dict[str, Path]) -> None:
    check_client(None)
    check_client(ClientTls())
    check_client(ClientTls(pki["ca.pem"], pki["client.pem"], pki["client.key"]))
