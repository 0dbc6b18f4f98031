"""Programs that refuse requests in their own words: clients get them as theirs to mend, nothing counts as failed."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from services.router.errors import MAX_REFUSAL_CHARACTERS, Refused
from services.router.metrics import FALLBACKS, RETRIES
from tests.router.harness import PROMPT, failing, model, running
from tests.router.openai_client import serving
from tests.router.programs import write
from tests.router.test_admin import use
from tests.router.test_split import results, split

COST_CAP = Path(__file__).parents[2] / "docs/examples/cost_cap.py"
REFUSED = ("INVALID_ARGUMENT", "REFUSED_BY_POLICY")
IN_A_TASK = (
    "    from services.router.policies import Refused\n"
    "    async def check():\n        raise Refused('not before tomorrow')\n"
    "    async with asyncio.TaskGroup() as group:\n        group.create_task(check())\n    yield"
)
HALF_WAY = (
    "    from services.router.policies import Refused\n"
    "    async for chunk in fleet.least_loaded(request).start_generate(request):\n"
    "        yield chunk\n        raise Refused('that is enough')"
)


async def test_the_client_gets_the_programs_words(caplog: pytest.LogCaptureFixture) -> None:
    before = [counter._metrics.copy() for counter in (RETRIES, FALLBACKS)]
    async with running(policy=f"{COST_CAP}:tokens=50") as suite:
        assert list((await suite.generate(PROMPT[:50])).token_ids) == model().generate(PROMPT[:50], 8)
        num_begun = len(suite.first.called("Session"))
        with failing(*REFUSED) as caught:
            await suite.generate(PROMPT)
        assert caught.value.message == "prompts over 50 tokens are not served here; this one has 51"
        assert caught.value.retry_delay_s is None
        assert len(suite.first.called("Session")) == num_begun
    assert [counter._metrics for counter in (RETRIES, FALLBACKS)] == before
    assert [record for record in caplog.records if record.name.startswith("services.router.programs")] == []


async def test_over_http_it_is_a_bad_request() -> None:
    async with serving(policy=f"{COST_CAP}:tokens=3") as (_, client):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.completions.create(model="fake", prompt=[5, 6, 7, 8], stream=stream)
            assert caught.value.code == "refused_by_policy"
            assert caught.value.type == "invalid_request_error"
            assert "prompts over 3 tokens" in caught.value.message


@pytest.mark.parametrize(("body", "words"), [(IN_A_TASK, "not before tomorrow"), (HALF_WAY, "that is enough")])
async def test_wherever_it_is_raised(body: str, words: str, tmp_path: Path) -> None:
    async with running(policy=str(write(tmp_path, "refusing", body))) as suite:
        with failing(*REFUSED) as caught:
            await suite.generate(max_tokens=100)
        assert caught.value.message == words
        await suite.idle()


async def test_a_split_counts_it_apart_from_failures() -> None:
    async with running(takes_uploads=True) as suite:
        await use(suite, "cost_cap:tokens=1", COST_CAP.read_text())
        await split(suite, data_parallel=1)
        with failing(*REFUSED):
            await suite.generate()
        arms = await results(suite)
        assert dict(arms["cost_cap:tokens=1"].request_count_by_code) == {"INVALID_ARGUMENT": 1}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a\x1b[31m\nb\t\u202e c \udcff", "a [31m b c"),
        ("", "the policy refuses this request"),
        ("é" * 10**6, "é" * MAX_REFUSAL_CHARACTERS),
    ],
)
def test_its_words_are_one_short_line(said: str, told: str) -> None:
    assert Refused(said).message == told
