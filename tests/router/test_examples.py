"""The programs of docs/policies.md: the page shows the files, and the files run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.router.programs.catalogue import BUILT_IN
from tests.fakes import FakeBug, FakeEngine, FakeError, Fault
from tests.router.harness import PROMPT, failing, model, running, verbs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/policies.md").read_text()
BLOCKS = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
PLANNERS = sorted((ROOT / "docs/examples/planners").glob("*.py"))  # test_planner.py runs them
LONGEST_PROGRAM = 15


def engines(names: str = "abc") -> list[FakeEngine]:
    peers: dict[str, FakeEngine] = {}
    return [FakeEngine(model(), name, peers=peers) for name in names]


def test_every_block_shows_a_file_and_every_example_is_shown() -> None:
    assert PAGE.count("```python") == len(BLOCKS)
    for name, shown in BLOCKS:
        assert (ROOT / name).read_text().endswith(shown), name
    assert {name for name, _ in BLOCKS} >= {str(path.relative_to(ROOT)) for path in (*EXAMPLES, *PLANNERS)}


@pytest.mark.parametrize("path", [*EXAMPLES, *BUILT_IN.glob("[!_]*.py")], ids=lambda path: path.stem)
def test_programs_are_short(path: Path) -> None:
    body = path.read_text().partition("async def policy(")[2].strip().splitlines()[1:]
    assert len(body) <= LONGEST_PROGRAM


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
async def test_examples_give_the_same_tokens(path: Path) -> None:
    async with running(engines=engines(), policy=str(path)) as suite:
        for prompt in (PROMPT[:2], PROMPT, PROMPT):
            assert list((await suite.generate(prompt)).token_ids) == model().generate(prompt, 8)


def example(name: str) -> str:
    return str(ROOT / f"docs/examples/{name}.py")


async def test_long_prompts_go_to_the_big_engine() -> None:
    fleet = engines()
    fleet[1].labels = {"size": "big"}
    async with running(engines=fleet, policy=example("long_to_big")) as suite:
        for policy, engine in (("", "a"), ("long_to_big:50", "b"), ("long_to_big:long=52", "a")):
            assert verbs(await suite.generate(policy=policy))[0][1] == engine


async def test_overlapped_starts_before_the_send_has_ended() -> None:
    async with running(engines=engines("ab"), policy=example("overlapped")) as suite:
        fault = suite.first.faults["RemoteSend"] = Fault()
        call = suite.stream()
        await fault.reached.wait()
        await suite.engines[1].until(lambda: suite.engines[1].sequences)
        call.cancel()


async def test_a_failed_sender_is_done_without() -> None:
    async with running(engines=engines("ab"), policy=example("sender_fails")) as suite:
        suite.first.faults["RemoteSend"] = Fault(FakeError("no sending today"))
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert verbs(answer)[-1] == ("start_generate", "b", 0, len(PROMPT))


async def test_two_senders_share_the_prompt() -> None:
    async with running(engines=engines(), policy=example("two_senders")) as suite:
        sends = [leg for leg in verbs(await suite.generate()) if leg[0] == "remote_send"]
        assert sends == [("remote_send", "a", 0, 24), ("remote_send", "b", 24, 50)]


async def test_a_context_moves_to_the_least_loaded_engine() -> None:
    async with running(engines=engines("ab"), policy=example("migrate_then_run")) as suite:
        source = suite.engines[1]
        source.kv.publish(PROMPT, "")
        await suite.cached(source, 12)
        answer = await suite.generate()
        assert verbs(answer)[:2] == [("prep_recv", "a", 0, 48), ("remote_send", "b", 0, 48)]
        assert answer.usage.cached_token_count == 48
        assert suite.first.called("Release")[0].publish


async def test_of_two_that_race_one_that_fails_has_lost() -> None:
    async with running(engines=engines("ab"), policy=example("hedged")) as suite:
        suite.first.faults["StartGenerate"] = Fault(FakeBug("not here"))
        answer = await suite.generate()
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert [leg.engine for leg in answer.legs] == ["a", "b"]


async def test_a_race_that_all_lose_is_told_as_an_engine_told_it() -> None:
    async with running(engines=engines("ab"), policy=example("hedged")) as suite:
        for engine in suite.engines:
            engine.faults["StartGenerate"] = Fault(FakeBug("no generating today"))
        with failing("INTERNAL", "INTERNAL"):
            await suite.generate()
