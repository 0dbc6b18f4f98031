"""adaptive over fake engines: it takes the pattern that is the cheapest, says why, and learns from what comes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from microserve.router.v1 import admin_pb2

from services.router.cost.book import FIRST_GUESS_OUTPUT
from services.router.cost.least_squares import LeastSquares
from services.router.cost.speeds import EngineSpeeds
from services.rpc.status import from_rpc_error
from tests.fakes import FakeEngine, Fault
from tests.router.harness import PROMPT, Running, failing, model, running, verbs

ON_FIRST = """
async def policy(request, fleet):
    [first] = [engine for engine in fleet.engines if engine.info.name == "a"]
    async for chunk in first.start_generate(request):
        yield chunk
"""
SURE = (1e-9,) * 5
END = len(PROMPT) - 1


def measured(suite: Running, engine: FakeEngine, *, token_s: float, step_s: float, sequence_s: float = 0.0) -> None:
    """What the router is to believe of an engine."""
    speeds = EngineSpeeds()
    speeds.steps = LeastSquares((step_s, token_s, 0.0, sequence_s, 0.0), SURE)
    suite.router.costs._engines[engine.address, engine.incarnation] = speeds


async def explain(suite: Running, request_id: str) -> admin_pb2.ExplainRequestResponse:
    try:
        return await suite.admin.ExplainRequest(admin_pb2.ExplainRequestRequest(request_id=request_id))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def test_an_idle_fleet_serves_data_parallel_and_says_why() -> None:
    async with running(policy="adaptive") as suite:
        answer = await suite.generate(request_id="mine")
        assert [verb for verb, *_ in verbs(answer)] == ["start_generate"]
        explained = await explain(suite, "mine")
        assert (explained.policy, explained.code, explained.output_token_count) == ("adaptive", "OK", 8)
        chosen = explained.chosen
        assert (chosen.pattern, chosen.decode_engine) == ("data_parallel", answer.legs[0].engine)
        assert {each.pattern for each in explained.alternatives} == {"data_parallel", "disaggregated", "balanced"}
        assert 0 < explained.ttft.ToNanoseconds() <= explained.jct.ToNanoseconds()
        total = chosen.jct.ToNanoseconds() + chosen.delay.ToNanoseconds()
        assert chosen.cost.ToNanoseconds() == pytest.approx(total, abs=2)
        assert explained.weighed_count > len(explained.alternatives)
        assert list(explained.legs) == list(answer.legs)


async def test_the_fast_one_prefills_and_the_other_decodes() -> None:
    async with running(policy="adaptive") as suite:
        measured(suite, suite.engines[0], token_s=1e-3, step_s=1.0)
        measured(suite, suite.engines[1], token_s=1.0, step_s=1e-2)
        answer = await suite.generate(request_id="mine", ignore_eos=True)
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        assert verbs(answer) == [
            ("prep_recv", "b", 0, END),
            ("remote_send", "a", 0, END),
            ("start_generate", "b", END, END + 1),
        ]
        assert (await explain(suite, "mine")).chosen.pattern == "disaggregated"


async def test_a_cached_context_is_used_where_it_is_and_moved_when_that_engine_is_busy(tmp_path: Path) -> None:
    path = tmp_path / "on_first.py"
    path.write_text(ON_FIRST)
    async with running(policy="adaptive", policy_file=(path,)) as suite:
        holder = suite.first
        for engine in suite.engines:
            measured(suite, engine, token_s=0.5, step_s=0.1)
        holder.kv.publish(PROMPT, "")
        await suite.cached(holder, 12)
        await suite.generate(request_id="cached")
        explained = await explain(suite, "cached")
        assert (explained.chosen.pattern, explained.chosen.decode_engine) == ("cached", "a")
        holder.gate.clear()
        measured(suite, holder, token_s=0.5, step_s=0.1, sequence_s=0.2)
        busy = [suite.stream(PROMPT, policy="on_first") for _ in range(3)]
        await holder.until(lambda: len(holder.sequences) == 3)
        answer = await suite.generate(request_id="moved")
        assert verbs(answer)[:2] == [("prep_recv", "b", 0, 48), ("remote_send", "a", 0, 48)]
        assert (await explain(suite, "moved")).chosen.pattern == "migration"
        assert list(answer.token_ids) == model().generate(PROMPT, 8)
        for call in busy:
            call.cancel()
        holder.gate.set()


async def test_what_engines_do_is_learned() -> None:
    async with running(policy="disaggregated") as suite:
        for number in range(10):
            await suite.generate(cache_salt=str(number))
        first, second = (suite.router.registry.members[each.address].snapshot() for each in suite.engines)
        costs = suite.router.costs
        assert costs.engine(second).reserve.num_observations == 10
        assert costs.link(first, second).send.num_observations == 10
        assert 0 < costs.link(first, second).send.predict((1.0, 0.0, 50.0)) < 1.0
        assert costs.mean_output(first.info.model.digest) < FIRST_GUESS_OUTPUT


async def test_a_sequence_is_seen_coming_while_its_kv_is_on_the_way() -> None:
    async with running(policy="disaggregated") as suite:
        sending = suite.first.faults["RemoteSend"] = Fault()
        call = suite.stream()
        await sending.reached.wait()
        receiver = suite.router.registry.members[suite.engines[1].address]
        assert receiver.snapshot().sequences == 1
        call.cancel()


async def test_who_asks_next_sees_what_has_been_chosen_before_anything_was_asked() -> None:
    """Prompts come to the engine that prefills only once there is room for them at the other."""
    async with running(4, policy="disaggregated") as suite:
        members = [suite.router.registry.members[each.address] for each in suite.engines]
        faults = [engine.faults.setdefault("PrepRecv", Fault()) for engine in suite.engines[2:]]
        calls = [suite.stream() for _ in range(2)]
        for fault in faults:
            await fault.reached.wait()
        seen = [member.snapshot() for member in members]
        assert [each.prompt_tokens for each in seen] == [len(PROMPT), len(PROMPT), 0, 0]
        assert [each.sequences for each in seen] == [0, 0, 1, 1]
        # What engines tell of is others', as long as they have not been asked for it.
        for member in members:
            for _ in range(2):
                member._take_load(replace(member.load, running=4, queued_tokens=1000))
            assert (member.others.sequences, member.others.prompt_tokens) == (4, 1000)
        for call in calls:
            call.cancel()
    assert not any(member.underway.prompt_tokens or member.underway.answers for member in members)


async def test_a_program_that_looks_again_is_not_led_by_what_it_saw_before(tmp_path: Path) -> None:
    path = tmp_path / "looks_often.py"
    path.write_text("""
async def policy(request, fleet):
    seen = {fleet.pair(request)[0].info.name for _ in range(3)}
    seen |= {fleet.pair_by_prefix(request)[0].info.name for _ in range(3)}
    assert seen == {"a"}, seen
    yield fleet.least_loaded(request).start_generate(request)
""")
    async with running(4, policy="looks_often", policy_file=(path,)) as suite:
        await suite.generate()


async def test_what_was_chosen_and_then_not_asked_for_counts_no_more(tmp_path: Path) -> None:
    path = tmp_path / "changes_its_mind.py"
    path.write_text("""
async def policy(request, fleet):
    _, decode = fleet.pair(request)
    async for chunk in decode.start_generate(request):
        yield chunk
""")
    async with running(policy="changes_its_mind", policy_file=(path,)) as suite:
        suite.engines[1].gate.clear()
        call = suite.stream()
        await suite.engines[1].until(lambda: suite.engines[1].sequences)
        members = [suite.router.registry.members[each.address] for each in suite.engines]
        assert [member.underway.prompt_tokens for member in members] == [0, len(PROMPT)]
        suite.engines[1].gate.set()
        call.cancel()


async def test_a_request_that_is_unknown_cannot_be_explained() -> None:
    async with running() as suite:
        await suite.generate(request_id="plain")
        assert not (await explain(suite, "plain")).HasField("chosen")
        with failing("NOT_FOUND", "UNKNOWN_REQUEST"):
            await explain(suite, "nope")
