"""Engines that join a router by themselves: who may, for how long, and how they leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import trustme
from microserve.router.v1 import registration_pb2, registration_pb2_grpc, router_pb2_grpc

from services.engine.config import EngineConfig
from services.engine.registration import Registrar
from services.router.app import Router
from services.router.config import RouterConfig
from services.rpc.channel import make_channel
from services.rpc.config import ConfigError, describe, read_config
from services.rpc.status import from_rpc_error
from services.rpc.tls import ClientTls
from tests.fakes import FakeEngine
from tests.router.harness import FAST, PROMPT, complete, failing, model, request

TOKEN = "a-token-for-engines"


@asynccontextmanager
async def empty_router(**options: Any) -> AsyncIterator[Router]:
    """A router that nobody has told of an engine."""
    router = Router(RouterConfig(**({"listen": "127.0.0.1:0"} | options)), backoff=FAST)
    try:
        await router.start()
        yield router
    finally:
        await router.close()


@asynccontextmanager
async def started_engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(model(), "a")
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def until(router: Router, num_engines: int) -> None:
    """Waits until so many engines take work."""
    changed = asyncio.Event()
    router.registry.on_change(changed.set)
    async with asyncio.timeout(60):
        while sum(member.healthy for member in router.registry.members.values()) != num_engines:
            await changed.wait()
            changed.clear()


async def register(router: Router, address: str, token: str | None = TOKEN, tls: ClientTls | None = None) -> float:
    """One call of Register; the lease in seconds. RemoteError."""
    metadata = [("authorization", f"Bearer {token}")] if token is not None else []
    async with make_channel(router.addresses.grpc, tls) as channel:
        stub = registration_pb2_grpc.RegistrationServiceStub(channel)
        try:
            reply = await stub.Register(registration_pb2.RegisterRequest(address=address), metadata=metadata, timeout=5)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return reply.lease.ToNanoseconds() / 1e9


async def test_an_engine_joins_serves_and_leaves() -> None:
    async with empty_router(register_token=TOKEN) as router, started_engine() as engine:
        registrar = Registrar([router.addresses.grpc], TOKEN, None)
        registrar.start(engine.address)
        await until(router, 1)
        assert router.membership.sources(engine.address) == ("register",)
        async with make_channel(router.addresses.grpc) as channel:
            answer = await complete(router_pb2_grpc.RouterServiceStub(channel), request())
            assert list(answer.token_ids) == model().generate(PROMPT, 8)
        await registrar.leave()
        assert not router.registry.members


@pytest.mark.slow
async def test_an_engine_registers_with_every_router_and_again_after_a_restart() -> None:
    async with empty_router(register_token=TOKEN) as first, started_engine() as engine:
        async with empty_router(register_token=TOKEN) as second:
            registrar = Registrar([first.addresses.grpc, second.addresses.grpc], TOKEN, None)
            registrar.start(engine.address)
            await until(first, 1)
            await until(second, 1)
            address = second.addresses.grpc
        async with empty_router(listen=address, register_token=TOKEN) as again:
            await until(again, 1)
            assert first.registry.members[engine.address].healthy
            await registrar.leave()


@pytest.mark.slow
async def test_an_engine_that_is_not_heard_of_leaves_with_its_lease() -> None:
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    async with empty_router(register_token=TOKEN, register_lease=0.5) as router, started_engine() as engine:
        router.registry.on_change(changed.set)
        serves = asyncio.ensure_future(until(router, 1))
        while not serves.done():  # until then it is heard of
            renewed = loop.time()
            assert await register(router, engine.address) == pytest.approx(0.5)
        async with asyncio.timeout(60):
            while router.registry.members:
                await changed.wait()
                changed.clear()
        assert loop.time() - renewed > 0.45


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x"])
async def test_who_has_not_the_token_stays_out(token: str | None) -> None:
    async with empty_router(register_token=TOKEN) as router:
        with failing("UNAUTHENTICATED", "NOT_AUTHENTICATED"):
            await register(router, "host:1", token)
        assert not router.registry.members


async def test_it_is_off_unless_it_is_asked_for() -> None:
    async with empty_router(engine=("127.0.0.1:1",)) as router:
        with failing("PERMISSION_DENIED", "REGISTRATION_DISABLED"):
            await register(router, "host:1", "")


async def test_bad_addresses_are_refused() -> None:
    async with empty_router(register_token=TOKEN) as router:
        for address in ("", "host", "host:0", "x" * 300 + ":1"):
            with failing("INVALID_ARGUMENT", "INVALID_REQUEST"):
                await register(router, address)


@pytest.mark.slow
async def test_a_certificate_is_as_good_as_a_token(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in ("router", "engine"):
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    tls = {name: tmp_path / f"router.{end}" for name, end in (("tls_cert", "pem"), ("tls_key", "key"))}
    options = {**tls, "tls_client_ca": tmp_path / "ca.pem", "register_by_certificate": True}
    async with empty_router(**options) as router:
        mine = ClientTls(tmp_path / "ca.pem", tmp_path / "engine.pem", tmp_path / "engine.key")
        await register(router, "host:1", None, mine)
        assert set(router.registry.members) == {"host:1"}
        with pytest.raises(Exception, match=r"UNAVAILABLE|failed to connect|handshake"):
            await register(router, "host:2", None, ClientTls(tmp_path / "ca.pem"))
        assert set(router.registry.members) == {"host:1"}


@pytest.mark.slow
async def test_engines_without_names_of_their_own_share_one_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("engines.example.org")
    certificate.private_key_pem.write_to_path(tmp_path / "engine.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "engine.pem")
    engine = FakeEngine(model(), "a")
    address = await engine.start(tls_cert=tmp_path / "engine.pem", tls_key=tmp_path / "engine.key")
    options = {"engine": (address,), "engine_tls_ca": tmp_path / "ca.pem"}
    async with empty_router(**options, engine_tls_name="engines.example.org") as router:
        await until(router, 1)
    async with empty_router(**options) as router:
        changed = asyncio.Event()
        router.registry.on_change(changed.set)
        async with asyncio.timeout(60):
            await changed.wait()  # its first try has failed
        assert router.registry.members[address].problem
        assert not router.registry.members[address].healthy
    await engine.stop()


def test_what_is_configured_is_checked_and_hidden() -> None:
    def router(*words: str) -> RouterConfig:
        return read_config(RouterConfig, words, "microserve-router", {})

    def engine(*words: str) -> EngineConfig:
        return read_config(EngineConfig, ["--model", "m", *words], "microserve-engine", {})

    for words in (["--register-token", "short"], ["--register-by-certificate"], ["--register-lease", "0"]):
        with pytest.raises(ConfigError):
            router(*words)
    assert describe(router("--register-token", TOKEN))["register_token"] == "***"
    with pytest.raises(ConfigError, match="advertise"):
        engine("--register", "r:1", "--listen", "0.0.0.0:1")
    with pytest.raises(ConfigError):
        engine("--register", "nowhere")
    config = engine("--register", "r:1", "--register-token", TOKEN)
    assert (config.register, describe(config)["register_token"]) == (("r:1",), "***")
    shared = {"MICROSERVE_REGISTER_TOKEN": TOKEN}
    assert read_config(RouterConfig, [], "microserve-router", shared).register_token == TOKEN
