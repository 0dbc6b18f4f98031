"""TLS and mTLS with certificates made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc.channel import ClientTls
from services.rpc.errors import StartError
from services.rpc.server import Server, ServerConfig
from services.rpc.tls import check_client
from tests.rpc.conftest import Serve

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


def test_files_that_are_right_are(pki: dict[str, Path]) -> None:
    check_client(None)
    check_client(ClientTls())
    check_client(ClientTls(pki["ca.pem"], pki["client.pem"], pki["client.key"]))
