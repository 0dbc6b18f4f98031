"""Engines behind a Kubernetes Service: its EndpointSlices, watched with the official client."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.protocol.errors import ServiceError
from services.router.errors import InvalidRequest
from services.router.fleet.backoff import Backoff, BackoffConfig
from services.router.fleet.membership import Membership, checked_address
from services.rpc.bind import join_address
from services.rpc.errors import StartError

if TYPE_CHECKING:
    from kubernetes.aio.client import ApiClient, V1EndpointSlice

log = logging.getLogger(__name__)

SERVICE_LABEL = "kubernetes.io/service-name"
# A watch is ended and begun again with a new list, so that nothing missed stays missed for longer.
WATCH_S = 60
_ANSWER_S = 10.0
_IN_CLUSTER_VARIABLE = "KUBERNETES_SERVICE_HOST"


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """A Service, and the port of its endpoints that engines listen on: by name or number, empty for the only one."""

    namespace: str
    service: str
    port: str = ""

    @classmethod
    def parse(cls, text: str) -> ServiceTarget:
        """From "namespace/service" or "namespace/service:port". ValueError."""
        namespace, slash, rest = text.partition("/")
        service, _, port = rest.partition(":")
        if not (namespace and slash and service) or "/" in rest:
            raise ValueError(f"{text!r} is not namespace/service or namespace/service:port")
        return cls(namespace, service, port)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service}" + (f":{self.port}" if self.port else "")


def addresses_of(slice_: V1EndpointSlice, port: str) -> list[str]:
    """host:port of every endpoint that is ready. An endpoint of which readiness is not known counts as ready, as the
    API says. InvalidRequest for what is no address, and where endpoints do not have one such port."""
    if not slice_.endpoints:
        return []
    ports = [each for each in slice_.ports or () if not port or port in (each.name, str(each.port))]
    numbers = [each.port for each in ports if each.port is not None]
    if len(numbers) != 1:
        raise InvalidRequest(f"{len(numbers)} of its ports are meant by {port!r}" if port else "name one of its ports")
    return [
        checked_address(join_address(host, numbers[0]))
        for endpoint in slice_.endpoints
        if endpoint.conditions is None or endpoint.conditions.ready is not False
        for host in endpoint.addresses[:1]  # the others are the same endpoint
    ]


async def follow_endpoint_slices(
    target: ServiceTarget, membership: Membership, backoff_config: BackoffConfig | None = None
) -> None:
    """Publishes the ready endpoints of a Service until cancelled. While the API does not answer, the last answer
    stands. StartError if the extra is not installed."""
    check_installed()
    follower = _Follower(target, membership)
    backoff = Backoff(backoff_config or BackoffConfig(first_s=0.5, longest_s=10.0))
    while True:
        try:
            async with _client() as client:
                while True:
                    await follower.follow(client)
                    backoff.reset()
                    # A proxy may end watches as soon as they begin: nobody is to be asked without a pause.
                    await backoff.wait()
        # The client raises what it likes: errors of its own, of aiohttp and of pydantic.
        except Exception as error:
            fields = {"service": str(target), "error": f"{type(error).__name__}: {error}"[:500]}
            log.warning("endpoint slices are not known", extra={"fields": fields})
        await backoff.wait()


def check_installed() -> None:
    """StartError if the official client is not installed."""
    try:
        import kubernetes.aio  # noqa: F401
    except ImportError:
        raise StartError("--engine-kubernetes needs the extra: pip install '.[kubernetes]' in the repository") from None


@asynccontextmanager
async def _client() -> AsyncIterator[ApiClient]:
    """A client for the cluster that the router runs in, else for that of the user's kubeconfig."""
    from kubernetes.aio import client, config

    configuration = client.Configuration()
    if os.environ.get(_IN_CLUSTER_VARIABLE):
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)
    async with client.ApiClient(configuration) as api:
        yield api


class _Follower:
    """One Service's slices by name."""

    def __init__(self, target: ServiceTarget, membership: Membership) -> None:
        self._target = target
        self._membership = membership
        self._addresses: dict[str, list[str]] = {}

    async def follow(self, api_client: ApiClient) -> None:
        """Lists the slices, then takes in changes until the watch ends."""
        from kubernetes.aio import client, watch

        api = client.DiscoveryV1Api(api_client)
        selector = f"{SERVICE_LABEL}={self._target.service}"
        async with asyncio.timeout(_ANSWER_S):
            listed = await api.list_namespaced_endpoint_slice(self._target.namespace, label_selector=selector)
        self._addresses = {}
        for each in listed.items:
            self._take("ADDED", each)
        self._publish()
        version = listed.metadata.resource_version if listed.metadata is not None else None
        changes = watch.Watch().stream(
            api.list_namespaced_endpoint_slice,
            self._target.namespace,
            label_selector=selector,
            resource_version=version,
            timeout_seconds=WATCH_S,
            _request_timeout=WATCH_S + _ANSWER_S,
        )
        async with changes:
            async for change in changes:
                self._take(change["type"], change["object"])
                self._publish()

    def _take(self, kind: str, slice_: V1EndpointSlice) -> None:
        if kind == "BOOKMARK":
            return
        name = slice_.metadata.name if slice_.metadata is not None else None
        if name is None:
            raise ValueError("an EndpointSlice has no name")
        self._addresses.pop(name, None)
        if kind != "DELETED":
            self._addresses[name] = self._addresses_of(name, slice_)

    def _addresses_of(self, name: str, slice_: V1EndpointSlice) -> list[str]:
        """None of a slice that makes no sense: the others are as good as before."""
        try:
            return addresses_of(slice_, self._target.port)
        except InvalidRequest as error:
            log.warning("endpoint slice not taken", extra={"fields": {"slice": name, "error": error.message}})
            return []

    def _publish(self) -> None:
        addresses = dict.fromkeys(each for found in self._addresses.values() for each in found)
        try:
            self._membership.publish(f"kubernetes:{self._target}", tuple(addresses))
        except ServiceError as error:
            log.warning("endpoints not taken", extra={"fields": {"service": str(self._target), "error": error.message}})
