"""TLS and mTLS with certificates made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.rpc.channel import ClientTls
from services.rpc.errors import StartError
from services.rpc.server import Server, ServerConfig
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
