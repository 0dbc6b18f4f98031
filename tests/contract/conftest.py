"""Two engines with room and one with little, all of them real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.contract.verbs import MAX_CONTEXT, PAGE_SIZE, SMALL_CONTEXT, SMALL_PAGES, VOCAB
from tests.e2e.suite import (
    Suite,
    start_suite,
)
from tests.faults.gates import StepGate
from tests.models import make_tiny_llama


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> StepGate:
    """Of the second engine."""
    return StepGate(tmp_path_factory.mktemp("gates") / "step")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory, steps: StepGate) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("model"), vocab=VOCAB, max_context=MAX_CONTEXT)
    large = ("--pages", "600", "--labels", "zone=a")
    small = ("--pages", str(SMALL_PAGES), "--max-context", str(SMALL_CONTEXT))
    options = {0: large, 1: (*large, *steps.options), 2: small}
    async with start_suite(model, num_engines=3, policy=None, page_size=PAGE_SIZE, options_of=options) as running:
        yield running
