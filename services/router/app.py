"""The router put together, without the process around it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from microserve.router.v1 import admin_pb2_grpc, registration_pb2_grpc, router_pb2_grpc

from services.router.admin.servicer import AdminServicer
from services.router.admission.admission import Admission
from services.router.config import RouterConfig
from services.router.cost.book import CostBook
from services.router.fleet.backoff import BackoffConfig
from services.router.fleet.breaker import BreakerConfig
from services.router.fleet.client import EngineClient
from services.router.fleet.dns import follow_dns
from services.router.fleet.endpoint_slices import ServiceTarget, check_installed, follow_endpoint_slices
from services.router.fleet.member import Member
from services.router.fleet.membership import STATIC, Membership
from services.router.fleet.registration import Registrations
from services.router.fleet.registry import Registry
from services.router.front.servicer import RouterServicer
from services.router.front.sessions import OpenSessions
from services.router.http import HttpServer
from services.router.key_files import LOOK_S, KeysInFile, key_of, tenants_of
from services.router.keys import KeyInterceptor, Keys
from services.router.openai.app import HttpApp
from services.router.openai.generation import HttpLimits
from services.router.planning.host import BUILT_IN, PlannerHost
from services.router.programs.catalogue import Catalogue
from services.router.programs.host import PolicyHost
from services.router.programs.library import Library
from services.router.programs.program import PLANNER
from services.router.programs.watchdog import Watchdog
from services.router.registration import RegistrationServicer
from services.router.service import GenerationService
from services.router.text.store import TokenizerStore
from services.router.traces import Traces
from services.rpc.channel import make_channel
from services.rpc.reloaded import Looks
from services.rpc.server import Server, ServerConfig
from services.rpc.tls import check_client

log = logging.getLogger(__name__)

ROUTER_SERVICE = "microserve.router.v1.RouterService"
ADMIN_SERVICE = "microserve.router.v1.AdminService"
REGISTRATION_SERVICE = "microserve.router.v1.RegistrationService"
# The longest that a router which has just started waits to hear of engines before it serves with those it knows.
FIRST_LOOK_S = 5.0


@dataclass(slots=True)
class Addresses:
    """Where a started router is reached, host:port each."""

    grpc: str = ""
    admin: str | None = None  # of its own, if it has one
    http: str | None = None


class Router:
    """One router. Make it, start it, run it and close it inside one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        backoff: BackoffConfig | None = None,
        on_stuck: Callable[[], None] | None = None,
    ) -> None:
        """BadPolicy if a program of the configuration cannot be loaded, StartError if a key or a certificate cannot.

        `on_stuck` is called from another thread when a program holds the event loop and cannot be interrupted.
        """
        check_client(config.engine_tls)
        self.config = config
        self.addresses = Addresses()
        self.registry = Registry(retire_s=config.request_timeout)
        self.membership = Membership(self.registry, self._member)
        self._tokenizers = TokenizerStore()
        self.catalogue = Catalogue(config.policy_file, config.policy)
        self._backoff = backoff or BackoffConfig()
        self._breaker = BreakerConfig(config.breaker_failures, config.breaker_first, config.breaker_longest)
        self._owner_id = f"router-{secrets.token_hex(12)}"  # new in every process, as the contract wants owners
        self._host = host = PolicyHost(self.registry, self.catalogue, config.run_limits)
        planners = Library(PLANNER, BUILT_IN, config.planner_file)
        self._first_planner = None if config.planner is None else planners.take_in(config.planner)
        self.planners = PlannerHost(
            self.registry, planners, host.traffic, host.costs, host.homes, config.planner_limits
        )
        traces = Traces(config.max_traces)
        self.admission = Admission(config.admission_limits, self.registry.capacity)
        self.registry.on_load(self.admission.pump, lambda: self.admission.num_waiting > 0)
        service = GenerationService(
            self.registry,
            self.catalogue,
            self._host,
            traces,
            admission=self.admission,
            max_request_s=config.request_timeout,
            salt_by_tenant=config.salt_by_tenant,
        )
        tenants, upload_key = _tenants(config), _upload_key(config)
        self.key_looks = Looks((file for file in (tenants, upload_key) if file is not None), every_s=LOOK_S)
        keys = Keys(config.api_key, file=None if tenants is None else tenants.last)
        # Never those of tenants.
        admin_keys = Keys(config.admin_key, "admin key (of --admin-key)") if config.admin_key else Keys(config.api_key)
        guard = KeyInterceptor({ROUTER_SERVICE: keys, ADMIN_SERVICE: admin_keys})
        self.server = Server(config, "router", interceptors=(guard,))
        self._front = RouterServicer(
            service,
            keys,
            OpenSessions(max_sessions=config.max_sessions, max_client_sessions=config.max_client_sessions),
            client_timeout_s=config.client_timeout,
            max_message_bytes=config.max_message_bytes,
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(self._front, self.server.grpc)
        shown = (self.registry, self.membership, self.catalogue, self.planners, traces)
        admin = AdminServicer(*shown, take_uploads=False)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self.server.grpc)
        self._admin_server: Server | None = None
        if config.admin_listen is not None:
            own_guard = KeyInterceptor({ADMIN_SERVICE: _own_keys(config, upload_key) or admin_keys})
            self._admin_server = Server(_admin_config(config, config.admin_listen), "admin", interceptors=(own_guard,))
            admin = AdminServicer(*shown, take_uploads=config.allow_policy_upload)
            admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, self._admin_server.grpc)
        limits = HttpLimits(config.max_message_bytes, config.client_timeout, config.max_requests)
        self._registrations = Registrations(self.membership, config.register_lease)
        registration = RegistrationServicer(
            self._registrations, config.register_token, trust_certificates=config.register_by_certificate
        )
        registration_pb2_grpc.add_RegistrationServiceServicer_to_server(registration, self.server.grpc)
        self._following: list[asyncio.Task[None]] = []  # sources that change by themselves
        self._http_app = HttpApp(service, lambda: self.serving, limits, keys)
        self._http = HttpServer(
            self._http_app,
            client_timeout_s=config.client_timeout,
            shared=config.reuse_port,
            # Who asked for TLS wants no prompt in clear text over HTTP either.
            tls=config.server_tls,
        )
        self._serving: bool | None = None
        self._knows_fleet = False
        self._looking: asyncio.TimerHandle | None = None
        self._draining = False
        self._watchdog = Watchdog(config.watchdog_limits, on_stuck)

    @property
    def serving(self) -> bool:
        """Whether new requests can be served: there is an engine, and the router is not draining."""
        return bool(self._serving) and not self._draining

    @property
    def costs(self) -> CostBook:
        """What was measured of the fleet."""
        return self._host.costs

    @property
    def num_running(self) -> int:
        """Programs that have not ended. After close(), those that ignore their cancellation."""
        return self._host.num_running

    async def start(self) -> Addresses:
        """Binds every address and begins to follow the engines. PortInUse, StartError."""
        self._watchdog.start()
        self.key_looks.start()
        self.addresses.grpc = await self.server.start()
        self.server.set_serving(ADMIN_SERVICE, True)
        self.server.set_serving(REGISTRATION_SERVICE, True)
        if self._admin_server is not None:
            self.addresses.admin = await self._admin_server.start()
            self._admin_server.set_serving(ADMIN_SERVICE, True)
        if self.config.http_listen is not None:
            self.addresses.http = await self._http.start(self.config.http_listen)
        self.registry.on_change(self._publish_health)
        if self.config.engine_kubernetes:
            check_installed()
        self._looking = asyncio.get_running_loop().call_later(FIRST_LOOK_S, self._end_looking)
        self.membership.publish(STATIC, self.config.engine)
        for service in self.config.engine_kubernetes:
            watch = follow_endpoint_slices(ServiceTarget.parse(service), self.membership)
            self._following.append(asyncio.create_task(watch, name=f"kubernetes {service}"))
        for target in self.config.engine_dns:
            follow = follow_dns(target, self.membership, self.config.dns_interval)
            self._following.append(asyncio.create_task(follow, name=f"dns {target}"))
        if self._first_planner is not None:
            await self.planners.start(self._first_planner)
        return self.addresses

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT or the launcher's death; requests under way get the grace."""
        await self.server.run(on_drain=self._drain)

    async def close(self) -> None:
        """Ends everything; requests still under way are cut off and released on their engines."""
        if self._looking is not None:
            self._looking.cancel()
        for task in self._following:
            task.cancel()
        await asyncio.gather(*self._following, return_exceptions=True)
        await self._http.close()
        for server in (self.server, self._admin_server):
            if server is not None:
                await server.stop(0)
        self._registrations.close()
        await self.planners.close()
        await self._host.close()
        await self.registry.stop()
        self.key_looks.close()
        self._watchdog.stop()

    async def _drain(self) -> None:
        self._draining = True
        self._front.drain()
        await self.planners.stop()
        await self._http_app.drain()

    def _member(self, address: str) -> Member:
        limit = self.config.max_message_bytes
        channel = make_channel(address, self.config.engine_tls, max_message_bytes=limit)
        client = EngineClient(
            address,
            channel,
            self._owner_id,
            max_buffered=self.config.max_buffered_tokens,
            max_message_bytes=limit,
        )
        return Member(address, client, self._tokenizers, self.registry, self._backoff, self._breaker)

    def _end_looking(self) -> None:
        self._knows_fleet = True
        self._publish_health()

    def _publish_health(self) -> None:
        # The first requests find the whole fleet: with one engine of two, programs that need a pair have none.
        self._knows_fleet = self._knows_fleet or all(each.is_known for each in self.registry.members.values())
        serving = self._knows_fleet and bool(self.registry.models())
        if serving != self._serving:
            self._serving = serving
            self.server.set_serving(ROUTER_SERVICE, serving)
            if serving:
                log.info("serving")
            else:
                log.warning("no engine can serve")


def _tenants(config: RouterConfig) -> KeysInFile | None:
    """What --tenant-key-file says, if there is one. StartError."""
    if config.tenant_key_file is None:
        return None
    return tenants_of(config.tenant_key_file, (*config.api_key, *config.admin_key))


def _upload_key(config: RouterConfig) -> KeysInFile | None:
    """What --upload-key-file says, if there is one that counts. StartError."""
    if config.admin_listen is None or config.upload_key_file is None:
        return None
    return key_of(config.upload_key_file)


def _own_keys(config: RouterConfig, file: KeysInFile | None) -> Keys | None:
    """Those of --admin-listen, if it has one of its own."""
    if file is None:
        return None
    return Keys(config.admin_key, "key (of --upload-key-file or --admin-key)", file=file.last)


def _admin_config(config: RouterConfig, listen: str) -> ServerConfig:
    return ServerConfig(
        listen=listen,
        tls_cert=config.tls_cert,
        tls_key=config.tls_key,
        tls_client_ca=config.tls_client_ca,
        metrics_port=None,
        grace_s=config.grace_s,
        max_message_bytes=config.max_message_bytes,
    )
