"""What operators see: metrics of every service, and the alerts and the dashboard of deploy/ that read them."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from services.router import metrics as of_router
from services.rpc.reloaded import RELOADS, STALE
from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import Suite, ask

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
# Prometheus adds the first; the second is that of histograms.
ADDED = {"instance", "le"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scraped(tiny_suite: Suite) -> dict[str, list[Metric]]:
    """Our families by service, after a request that was disaggregated."""
    await ask(tiny_suite, mixed_prompts(3, 512, 100)[-1], "disaggregated", salt="observing")
    router = tiny_suite.router_process
    assert router is not None
    processes = [router, tiny_suite.kvtransfer, *(engine.process for engine in tiny_suite.engines)]
    return {process.name: await asyncio.to_thread(scrape, str(process.metrics)) for process in processes}


def scrape(address: str) -> list[Metric]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as reply:
        families = text_string_to_metric_families(reply.read().decode())
    return [family for family in families if family.name.startswith("microserve_")]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of all alerts and panels."""
    for group in yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads((DEPLOY / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def labels_of(scraped: dict[str, list[Metric]]) -> dict[str, set[str]]:
    """Labels by name of a series: what was seen, and what is declared and nobody has had a reason to count."""
    found: dict[str, set[str]] = {}
    for family in (each for families in scraped.values() for each in families):
        found.setdefault(f"{family.name}_total" if family.type == "counter" else family.name, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for metric in (RELOADS, STALE, *vars(of_router).values()):
        if isinstance(metric, Counter | Gauge | Histogram):
            name = f"{metric._name}_total" if isinstance(metric, Counter) else metric._name
            found.setdefault(name, set()).update(metric._labelnames)
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
async def test_alerts_and_panels_read_what_there_is(
    scraped: dict[str, list[Metric]], where: str, expression: str
) -> None:
    labels = labels_of(scraped)
    selectors = re.findall(r"(microserve_\w+)(?:\{([^}]*)\})?", expression)
    assert selectors
    for name, matchers in selectors:
        assert name in labels, f"{where}: nothing is called {name}"
        assert set(re.findall(r"(\w+)\s*[=!]", matchers)) <= labels[name], f"{where}: {name} has {labels[name]}"
    known = set().union(*(labels[name] for name, _ in selectors)) | ADDED
    for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(names.split(", ")) <= known, f"{where}: {names}"


async def test_names_units_and_help_are_as_prometheus_wants_them(scraped: dict[str, list[Metric]]) -> None:
    for family in (each for families in scraped.values() for each in families):
        assert family.documentation.endswith("."), family.name
        assert not re.search(r"_(ms|us|milliseconds|kb|mb|mib|minutes|count|total)$", family.name), family.name
        if family.type == "counter":
            assert all(sample.name == f"{family.name}_total" for sample in family.samples)
        series = [(sample.name, *sorted(sample.labels.items())) for sample in family.samples]
        assert len(series) == len(set(series)), family.name


async def test_every_service_says_which_it_is(scraped: dict[str, list[Metric]], tiny_suite: Suite) -> None:
    for name, families in scraped.items():
        (build,) = [
            sample for family in families for sample in family.samples if sample.name == "microserve_build_info"
        ]
        assert name.startswith(build.labels["service"])
        assert build.labels["version"]
    for engine in tiny_suite.engines:
        found = {sample.name: sample for family in scraped[engine.name] for sample in family.samples}
        described = found["microserve_engine_info"].labels
        assert described["engine"] == engine.name
        assert (described["model"], described["device"]) == ("tiny", "cpu")
        assert re.fullmatch("[0-9a-f]{12}", described["model_digest"])
        assert found["microserve_engine_max_sequences"].value == 64
