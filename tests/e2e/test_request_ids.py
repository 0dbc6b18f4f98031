"""A client's name for its request, through a router, in the logs of the engines that worked on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from microserve.engine.v1 import engine_pb2 as engine
from microserve.router.v1 import router_pb2 as router
from microserve.types.v1 import sampling_pb2 as sampling

from tests.e2e.prompts import mixed_prompts
from tests.e2e.suite import OWNER, Suite, start_suite
from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow

# What a terminal would obey or break a line at, and what would look like fields of ours.
HOSTILE = 'mine"\n level=error\x1b[2J\x9b2J\u2028\u202e'
SHOWN = r'request="mine\"\n level=error\u001b[2J\u009b2J\u2028\u202e"'


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def suite(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    model = make_tiny_llama(tmp_path_factory.mktemp("models"))
    async with start_suite(model, engine_options=("--log-level", "debug")) as running:
        yield running


async def test_each_verb_is_found_by_the_clients_name(suite: Suite) -> None:
    assert suite.router is not None
    request = router.GenerateRequest(
        tokens=router.TokenIds(ids=mixed_prompts(5, 512, 100)[-1]),
        sampling=sampling.SamplingParams(max_tokens=3, ignore_eos=True),
        request_id="order-17",
    )
    await suite.router.Complete(router.CompleteRequest(request=request), timeout=120)
    found = [line for line in told(suite) if " request=order-17 " in line]
    assert sorted(line.partition(" verb=")[2].split()[0] for line in found) == [
        "PrepRecv",
        "RemoteSend",
        "StartGenerate",
    ]


async def test_a_name_from_elsewhere_makes_no_record_and_no_field(suite: Suite) -> None:
    """The router refuses such a name, but others may call an engine."""
    request = engine.StartGenerateRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=[5, 6, 7],
        sampling=sampling.SamplingParams(max_tokens=1, ignore_eos=True),
        client_request_id=HOSTILE,
    )
    await suite.engines[0].stub.Complete(engine.CompleteRequest(start=request), timeout=120)
    (line,) = [line for line in told(suite) if SHOWN in line]
    assert line.startswith("time=")
    assert line.isprintable()


def told(suite: Suite) -> list[str]:
    """Records of verbs that have ended. An engine writes one before the caller has its answer."""
    lines = [line for each in suite.engines for line in each.process.log_path.read_text().split("\n")]
    return [line for line in lines if ' msg="call ended" ' in line]
