"""Files in deploy/ fit the services: every command line is one that the service takes, ports and graces agree.

No image is built and no cluster is asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.engine.config import EngineConfig
from services.kvtransfer.config import KvTransferConfig
from services.router.config import RouterConfig
from services.rpc.bind import split_address
from services.rpc.config import read_config
from services.rpc.server_config import ServerConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MANIFESTS = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
CONFIGS: dict[str, type[ServerConfig]] = {
    "engine": EngineConfig,
    "kvtransfer": KvTransferConfig,
    "router": RouterConfig,
}


def config_of(service: str, arguments: list[str]) -> ServerConfig:
    """What the service makes of its image's entry point followed by `arguments`."""
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (DEPLOY / f"{service}.Dockerfile").read_text(), re.MULTILINE)
    program, *own = yaml.safe_load(entry)
    assert program == f"microserve-{service}"
    arguments = [re.sub(r"\$\(POD_IP\)", "10.0.0.1", each) for each in arguments]
    return read_config(CONFIGS[service], [*own, *arguments], program, {})


def pods() -> Iterator[tuple[dict[str, Any], list[tuple[dict[str, Any], ServerConfig]]]]:
    """Each pod's specification with its services, sidecars among them, and their options."""
    for manifest in MANIFESTS:
        if "template" in manifest.get("spec", {}):
            pod = manifest["spec"]["template"]["spec"]
            sidecars = [each for each in pod.get("initContainers", ()) if each.get("restartPolicy") == "Always"]
            yield pod, [(each, config_of(each["name"], each["args"])) for each in [*sidecars, *pod["containers"]]]


@pytest.mark.slow
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifests_fit_the_schemas_of_kubernetes(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_probes_ask_where_services_listen() -> None:
    for _, services in pods():
        for container, config in services:
            port = split_address(config.listen)[1]
            assert container["readinessProbe"]["grpc"]["port"] == port
            assert container["livenessProbe"]["tcpSocket"]["port"] == port
            assert port in [each["containerPort"] for each in container["ports"]]
            assert config.metrics_host == "0.0.0.0" or isinstance(config, RouterConfig)


def test_pods_may_take_their_grace() -> None:
    """Sidecars end after the other containers, which end together."""
    for pod, services in pods():
        graces = [
            config.grace_s + container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            for container, config in services
        ]
        assert pod["terminationGracePeriodSeconds"] > sum(graces)


def test_pools_fit_into_what_the_transfer_service_may_take() -> None:
    for _, services in pods():
        configs = {container["name"]: config for container, config in services}
        if isinstance(transfer := configs.get("kvtransfer"), KvTransferConfig):
            engine = configs["engine"]
            assert isinstance(engine, EngineConfig)
            assert engine.kv_memory_mib is not None
            assert transfer.max_pool_bytes is not None
            assert engine.kv_memory_mib << 20 < transfer.max_pool_bytes


def test_the_router_watches_the_engines() -> None:
    named = {(each["kind"], each["metadata"]["name"]): each for each in MANIFESTS}
    (router,) = [config for _, services in pods() for _, config in services if isinstance(config, RouterConfig)]
    (target,) = router.engine_kubernetes
    namespace, service, port = re.split("[/:]", target)
    engines = named["Service", service]
    assert engines["metadata"]["namespace"] == namespace
    assert port in [each["name"] for each in engines["spec"]["ports"]]
    labels = named["StatefulSet", "engine"]["spec"]["template"]["metadata"]["labels"]
    assert engines["spec"]["selector"].items() <= labels.items()
    (rule,) = named["Role", "router"]["rules"]
    assert rule == {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}


def test_compose_gives_options_that_services_have() -> None:
    for name, service in COMPOSE.items():
        if name in ("kvtransfer", "engine-0", "engine-1", "router"):
            config = config_of(name.partition("-")[0], service["command"])
            grace = int(service.get("stop_grace_period", "10s").removesuffix("s"))
            assert grace > config.grace_s, f"{name} is killed before it has drained"


def test_the_image_of_an_engine_compiles_its_kernels_where_the_engine_looks_for_them() -> None:
    """In the cache that it serves with, as the user that serves, from the installed package, and before the volume."""
    lines = (DEPLOY / "engine.Dockerfile").read_text().splitlines()
    order = ["ENV XDG_CACHE_HOME=/cache", "USER nobody", "WORKDIR /tmp", "RUN python -m services.engine.kernels"]
    places = [lines.index(line) for line in [*order, "VOLUME /cache"]]
    assert places == sorted(places)
    makefile = (DEPLOY.parent / "Makefile").read_text()
    assert "python -m services.engine.kernels" in makefile
