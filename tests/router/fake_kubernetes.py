"""A Kubernetes API server that knows EndpointSlices and nothing else: list and watch, as discovery.k8s.io/v1 says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

Json = dict[str, Any]
PATH = "/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"


def slice_of(name: str, hosts: dict[str, Json | None], service: str = "engines", **fields: Any) -> Json:
    """A slice as the API gives it; `hosts` by address with their conditions."""
    body = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "models", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "grpc", "port": 50051, "protocol": "TCP"}],
        "endpoints": [
            {"addresses": [host]} | ({"conditions": conditions} if conditions is not None else {})
            for host, conditions in hosts.items()
        ],
    }
    return body | fields


class FakeKubernetes:
    """Slices by name, and everybody who watches them."""

    def __init__(self) -> None:
        self.slices: dict[str, Json] = {}
        self.version = 100
        self.queries: list[dict[str, str]] = []
        self.fail_with = 0  # an HTTP status for every request while it is set
        self.asked, self.watched = asyncio.Event(), asyncio.Event()
        self._watchers: set[asyncio.Queue[Json | None]] = set()

    def put(self, body: Json) -> None:
        """Adds or changes a slice."""
        name = body["metadata"]["name"]
        kind = "MODIFIED" if name in self.slices else "ADDED"
        self.slices[name] = body
        self._tell(kind, body)

    def delete(self, name: str) -> None:
        self._tell("DELETED", self.slices.pop(name))

    def expire(self) -> None:
        """Every watch is told that its version is too old, and ends."""
        status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
        for watcher in self._watchers:
            watcher.put_nowait({"type": "ERROR", "object": status})

    def hang_up(self) -> None:
        """Every watch ends, as it does when its time is over."""
        for watcher in self._watchers:
            watcher.put_nowait(None)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.queries.append(dict(request.query))
        self.asked.set()
        if self.fail_with:
            return web.json_response({"kind": "Status", "code": self.fail_with}, status=self.fail_with)
        service = request.query["labelSelector"].removeprefix("kubernetes.io/service-name=")
        if request.query.get("watch") not in ("true", "True"):
            items = [each for each in self.slices.values() if _belongs(each, service)]
            return web.json_response(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSliceList",
                    "metadata": {"resourceVersion": str(self.version)},
                    "items": items,
                }
            )
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        queue: asyncio.Queue[Json | None] = asyncio.Queue()
        self._watchers.add(queue)
        self.watched.set()
        try:
            while (event := await queue.get()) is not None:
                if event["type"] == "ERROR" or _belongs(event["object"], service):
                    await response.write(json.dumps(event).encode() + b"\n")
        finally:
            self._watchers.discard(queue)
        return response

    def _tell(self, kind: str, body: Json) -> None:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        for watcher in self._watchers:
            watcher.put_nowait({"type": kind, "object": body})


@asynccontextmanager
async def fake_kubernetes(folder: Path) -> AsyncIterator[tuple[FakeKubernetes, Path]]:
    """The server, and a kubeconfig for it."""
    api, app = FakeKubernetes(), web.Application()
    app.router.add_get(PATH, api.serve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": f"http://{host}:{port}"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        "users": [{"name": "fake", "user": {"token": "t"}}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield api, path
    finally:
        await runner.cleanup()


def _belongs(body: Json, service: str) -> bool:
    return body["metadata"]["labels"].get("kubernetes.io/service-name") == service
