"""Two suites that modules share: two engines and a router, with a tiny model and with the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from services.engine.model.fetch import fetch_model
from tests.e2e.shared import SharedSuite
from tests.e2e.suite import Suite, start_suite
from tests.models import make_tiny_llama


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny_shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SharedSuite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    shared = SharedSuite(partial(start_suite, model))
    yield shared
    await shared.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def real_shared() -> AsyncIterator[SharedSuite]:
    """SmolLM2-135M, as `make run` serves it, but in float32."""
    model = fetch_model("smollm2-135m", show_progress=False)
    shared = SharedSuite(partial(start_suite, model, kv_memory_mib=512))
    yield shared
    await shared.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tiny_suite(tiny_shared: SharedSuite) -> AsyncIterator[Suite]:
    async with tiny_shared.lent() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def real_suite(real_shared: SharedSuite) -> AsyncIterator[Suite]:
    async with real_shared.lent() as running:
        yield running
