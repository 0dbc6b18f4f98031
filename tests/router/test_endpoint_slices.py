"""Engines behind a Kubernetes Service, with the official client over real HTTP."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio import client

from services.router.app import Router
from services.router.config import RouterConfig
from services.router.errors import FleetFull, InvalidRequest
from services.router.fleet import endpoint_slices
from services.router.fleet.backoff import BackoffConfig
from services.router.fleet.endpoint_slices import ServiceTarget, addresses_of, follow_endpoint_slices
from services.rpc.errors import StartError
from tests.fakes import FakeEngine
from tests.router.fake_kubernetes import FakeKubernetes, fake_kubernetes, slice_of
from tests.router.harness import FAST, model

READY, NOT_READY = {"ready": True}, {"ready": False, "serving": True, "terminating": True}


class Published:
    """What a membership was told, and waiting for it."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.is_full = False
        self._told = asyncio.Event()

    def publish(self, source: str, addresses: Collection[str]) -> None:
        assert source == "kubernetes:models/engines:grpc"
        self._told.set()
        if self.is_full:
            raise FleetFull("too many")
        self.addresses = list(addresses)

    async def until(self, *hosts: str) -> None:
        expected = [f"{host}:50051" for host in hosts]
        async with asyncio.timeout(60):
            while self.addresses != expected:
                self._told.clear()
                await self._told.wait()


@asynccontextmanager
async def following(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *slices: dict[str, Any]
) -> AsyncIterator[tuple[FakeKubernetes, Published]]:
    async with fake_kubernetes(folder) as (api, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        for each in slices:
            api.put(each)
        published = Published()
        target = ServiceTarget.parse("models/engines:grpc")
        follow = follow_endpoint_slices(target, published, BackoffConfig(0.01, 0.05))  # type: ignore[arg-type]
        task = asyncio.create_task(follow)
        try:
            yield api, published
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_slices_are_listed_and_then_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = slice_of("engines-1", {"10.0.0.1": READY, "10.0.0.2": NOT_READY, "10.0.0.3": None})
    other = slice_of("others-1", {"10.9.9.9": READY}, service="others")
    async with following(tmp_path, monkeypatch, first, other) as (api, published):
        await published.until("10.0.0.1", "10.0.0.3")
        await api.watched.wait()
        api.put(slice_of("engines-2", {"10.0.0.4": READY}))
        await published.until("10.0.0.1", "10.0.0.3", "10.0.0.4")
        api.put(slice_of("engines-2", {"10.0.0.4": NOT_READY, "10.0.0.5": READY}))
        await published.until("10.0.0.1", "10.0.0.3", "10.0.0.5")
        api.delete("engines-1")
        await published.until("10.0.0.5")
        assert api.queries[1]["resourceVersion"] == "102"
        assert {query["labelSelector"] for query in api.queries} == {"kubernetes.io/service-name=engines"}


async def test_a_watch_that_ends_or_expires_begins_with_a_new_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    wait = endpoint_slices.Backoff.wait

    async def wait_and_count(self: endpoint_slices.Backoff) -> None:
        waits.append(1)
        await wait(self)

    monkeypatch.setattr(endpoint_slices.Backoff, "wait", wait_and_count)
    async with following(tmp_path, monkeypatch, slice_of("engines-1", {"10.0.0.1": READY})) as (api, published):
        await published.until("10.0.0.1")
        for number, end in enumerate((api.hang_up, api.expire), start=2):
            await api.watched.wait()
            api.watched.clear()
            api.slices["engines-1"] = slice_of("engines-1", {f"10.0.0.{number}": READY})  # nobody is told
            end()
            await published.until(f"10.0.0.{number}")
            assert len(waits) == number - 1, "not without a pause, however often the API ends watches"


async def test_while_the_api_fails_the_last_answer_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with following(tmp_path, monkeypatch, slice_of("engines-1", {"10.0.0.1": READY})) as (api, published):
        await published.until("10.0.0.1")
        await api.watched.wait()
        api.fail_with = 503
        api.hang_up()
        async with asyncio.timeout(60):
            while len(api.queries) < 6:
                api.asked.clear()
                await api.asked.wait()
        assert published.addresses == ["10.0.0.1:50051"]
        assert "endpoint slices are not known" in caplog.text
        api.slices["engines-1"] = slice_of("engines-1", {"10.0.0.2": READY})
        api.fail_with = 0
        await published.until("10.0.0.2")


async def test_a_slice_that_makes_no_sense_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = [slice_of("engines-1", {"10.0.0.1": READY, "not an address": READY}), slice_of("engines-2", {"::": READY})]
    slices.append(slice_of("engines-3", {"10.0.0.3": READY}))
    slices[1]["ports"] = [{"name": "grpc", "port": 0}]
    async with following(tmp_path, monkeypatch, *slices) as (_, published):
        await published.until("10.0.0.3")


@pytest.mark.parametrize(
    "broken",
    [
        slice_of("engines-2", {}, endpoints=[{"addresses": []}]),
        slice_of("engines-2", {}, endpoints="none"),
        slice_of("engines-2", {"not an address": READY}),
        slice_of("engines-2", {"10.0.0.2": READY}, ports=[{"name": "grpc", "port": 0}]),
        slice_of("engines-2", {"10.0.0.2": READY}, ports=[{"name": "grpc", "port": "x"}]),
    ],
    ids=["no address", "no list", "no host", "port 0", "no number"],
)
async def test_what_makes_no_sense_is_not_taken(
    broken: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with following(tmp_path, monkeypatch, slice_of("engines-1", {"10.0.0.1": READY})) as (api, published):
        await published.until("10.0.0.1")
        await api.watched.wait()
        api.put(broken)
        api.put(slice_of("engines-2", {"10.0.0.3": READY}))
        await published.until("10.0.0.1", "10.0.0.3")


async def test_a_fleet_that_is_full_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with following(tmp_path, monkeypatch, slice_of("engines-1", {"10.0.0.1": READY})) as (api, published):
        await published.until("10.0.0.1")
        await api.watched.wait()
        published.is_full = True
        published._told.clear()
        api.put(slice_of("engines-2", {"10.0.0.2": READY}))
        async with asyncio.timeout(60):
            await published._told.wait()
        published.is_full = False
        api.put(slice_of("engines-3", {"10.0.0.3": READY}))
        await published.until("10.0.0.1", "10.0.0.2", "10.0.0.3")


async def test_a_router_serves_with_engines_from_kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(model(), "a")
    host, _, port = (await engine.start()).rpartition(":")
    async with fake_kubernetes(tmp_path) as (api, kubeconfig):
        monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
        api.put(slice_of("engines-1", {host: READY}, ports=[{"name": "grpc", "port": int(port)}]))
        router = Router(RouterConfig(listen="127.0.0.1:0", engine_kubernetes=("models/engines",)), backoff=FAST)
        changed = asyncio.Event()
        router.registry.on_change(changed.set)
        try:
            await router.start()
            async with asyncio.timeout(60):
                while not router.serving:
                    await changed.wait()
                    changed.clear()
            assert router.membership.sources(engine.address) == ("kubernetes:models/engines",)
        finally:
            await router.close()
            await engine.stop()


def test_ports_are_chosen_by_name_number_or_being_alone() -> None:
    both = [{"name": "grpc", "port": 1}, {"name": "metrics", "port": 2}]
    two = client.V1EndpointSlice.from_dict(slice_of("s", {"10.0.0.1": READY}, ports=both))
    assert addresses_of(two, "grpc") == ["10.0.0.1:1"]
    assert addresses_of(two, "2") == ["10.0.0.1:2"]
    for port in ("", "other"):  # no engine joins, and the log is to say why
        with pytest.raises(InvalidRequest, match="port"):
            addresses_of(two, port)
    unused = client.V1EndpointSlice.from_dict(slice_of("s", {}, ports=None))  # of a Service that has no pod
    assert addresses_of(unused, "grpc") == []
    six = client.V1EndpointSlice.from_dict(slice_of("s", {"fd00::1": READY}, addressType="IPv6"))
    assert addresses_of(six, "") == ["[fd00::1]:50051"]


@pytest.mark.parametrize("text", ["", "engines", "/engines", "models/", "a/b/c"])
def test_targets_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="namespace/service"):
        ServiceTarget.parse(text)
    with pytest.raises(ValueError):
        RouterConfig(engine_kubernetes=(text,))


async def test_without_the_extra_the_router_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.aio", None)
    router = Router(RouterConfig(listen="127.0.0.1:0", engine_kubernetes=("models/engines",)))
    with pytest.raises(StartError, match="pip install"):
        await router.start()
    await router.close()
