"""Two engines with room and one with little, all of them real processes, which the modules share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from tests.contract.verbs import MAX_CONTEXT, PAGE_SIZE, PAGES, SMALL_CONTEXT, SMALL_PAGES, VOCAB
from tests.e2e.shared import SharedSuite
from tests.e2e.suite import Suite, start_suite
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama


@pytest.fixture(scope="session")
def gates(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepGate, StepGate]:
    """Of the two engines with room."""
    folder = tmp_path_factory.mktemp("gates")
    return StepGate(folder / "first"), StepGate(folder / "second")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(
    tmp_path_factory: pytest.TempPathFactory, gates: tuple[StepGate, StepGate]
) -> AsyncIterator[SharedSuite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"), vocab=VOCAB, max_context=MAX_CONTEXT)
    options = {i: ("--pages", str(PAGES), "--labels", "zone=a", *gate.options) for i, gate in enumerate(gates)}
    options[2] = ("--pages", str(SMALL_PAGES), "--max-context", str(SMALL_CONTEXT))
    shared = SharedSuite(
        partial(start_suite, model, num_engines=3, policy=None, page_size=PAGE_SIZE, options_of=options)
    )
    yield shared
    await shared.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(shared: SharedSuite) -> AsyncIterator[Suite]:
    async with shared.lent() as running:
        yield running
