"""Simulated engines keep the schedules that one works out by hand, and the real programs run over them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from services.router.errors import UnknownPolicy
from services.router.simulate.fleet import Arrival, simulated_router
from services.router.simulate.hardware import EngineHardware, FleetHardware
from services.router.traces import Trace
from services.rpc.virtual_loop import run

# A step takes a second, a prompt's token 0.01 more, a sequence that decodes 0.1 more; moving a token takes 1 ms.
ENGINE = EngineHardware(1.0, 0.01, 0.1, 0.0, 0.0, page_size=16, max_step_tokens=64)
ONE = FleetHardware({"a": ENGINE}, bytes_per_token=1, bytes_per_s=1000, call_s=0.0)
TWO = replace(ONE, engines={"a": ENGINE, "b": ENGINE})


def prompt(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def serve(fleet: FleetHardware, policy: str, *arrivals: Arrival, files: Sequence[Path] = ()) -> list[Trace]:
    async def main() -> list[Trace]:
        async with simulated_router(fleet, files) as router:
            return await router.serve(policy, arrivals)

    return run(main())


def times(traces: Sequence[Trace]) -> list[float | None]:
    """Of each the time to the first token and to the last."""
    assert {trace.code for trace in traces} == {"OK"}
    return [time for trace in traces for time in (trace.first_token_s, trace.duration_s)]


@pytest.fixture
def last_engine(tmp_path: Path) -> Path:
    """A program that uses the last engine alone."""
    path = tmp_path / "last_engine.py"
    path.write_text("""
async def policy(request, fleet):
    async for chunk in fleet.engines[-1].start_generate(request):
        yield chunk
""")
    return path


def test_one_request_alone() -> None:
    [trace] = serve(ONE, "data_parallel", Arrival(0.0, prompt(32), 3))
    assert times([trace]) == pytest.approx([1.32, 1.32 + 2 * 1.1])
    assert trace.output_tokens == 3
    timing = trace.legs[0].timing
    assert timing is not None
    assert (timing.computed_tokens, timing.generated_tokens, timing.prefill_s) == (32, 3, pytest.approx(1.32))


def test_two_at_once_share_their_steps() -> None:
    traces = serve(ONE, "data_parallel", Arrival(0.0, prompt(32), 3), Arrival(0.0, prompt(32, 100), 3))
    assert times(traces) == pytest.approx([1.64, 1.64 + 2 * 1.2] * 2)


def test_a_long_prompt_is_computed_in_pieces_that_end_with_pages() -> None:
    """64 tokens, then 36; and beside one that decodes 48 of 64, then 16."""
    assert times(serve(ONE, "data_parallel", Arrival(0.0, prompt(100), 1))) == pytest.approx([3.0, 3.0])
    traces = serve(ONE, "data_parallel", Arrival(0.0, prompt(32), 4), Arrival(1.5, prompt(64, 100), 1))
    begin = 1.32 + 1.1  # it comes in the middle of a step
    both = begin + 1.58 + 1.26
    assert times(traces) == pytest.approx([1.32, both, both - 1.5, both - 1.5])


def test_a_prefix_that_is_cached_or_being_computed_is_not_computed_again() -> None:
    traces = serve(ONE, "data_parallel", Arrival(0.0, prompt(48), 1), Arrival(0.0, prompt(48), 1))
    assert times(traces) == pytest.approx([1.48, 1.48, 1.48 + 1.16, 1.48 + 1.16])
    last = traces[1].legs[0].timing
    assert last is not None
    assert (last.matched_tokens, last.computed_tokens) == (32, 16)


@pytest.mark.parametrize(("bytes_per_s", "ready_s"), [(1000.0, 1.32), (10.0, 3.2)])
def test_kv_moves_while_it_is_computed(bytes_per_s: float, ready_s: float) -> None:
    """As long as the link keeps up, it is there when the last layer is."""
    fleet = replace(TWO, bytes_per_s=bytes_per_s)
    [trace] = serve(fleet, "disaggregated", Arrival(0.0, prompt(33), 2))
    assert [(leg.verb.value, leg.engine) for leg in trace.legs] == [
        ("prep_recv", "b"),
        ("remote_send", "a"),
        ("start_generate", "b"),
    ]
    assert times([trace]) == pytest.approx([ready_s + 1.1, ready_s + 2.2])


def test_a_free_engine_is_taken() -> None:
    traces = serve(TWO, "data_parallel", Arrival(0.0, prompt(64), 2), Arrival(0.0, prompt(64, 900), 2))
    assert [trace.legs[0].engine for trace in traces] == ["a", "b"]


def test_a_call_to_a_busy_engine_is_heard_after_its_step(last_engine: Path) -> None:
    """b is asked to reserve at 1 s, within a step that ends at 1.64 s; then a computes, then b."""

    async def main() -> list[list[Trace]]:
        async with simulated_router(TWO, [last_engine]) as router:
            occupying = router.serve("last_engine", [Arrival(0.0, prompt(64, 500), 1)])
            return await asyncio.gather(occupying, router.serve("disaggregated", [Arrival(1.0, prompt(33), 1)]))

    _, traces = run(main())
    assert times(traces) == pytest.approx([1.64 + 1.32 + 1.1 - 1.0] * 2)


def test_calls_take_their_time() -> None:
    [trace] = serve(replace(TWO, call_s=0.2), "disaggregated", Arrival(0.0, prompt(33), 1))
    assert times([trace]) == pytest.approx([0.2 + 0.2 + 1.32 + 0.1 + 1.1] * 2)


def test_adaptive_lets_an_answer_end_before_a_long_prompt() -> None:
    """What it costs the prompt is less than what it saves the answer."""

    async def main(policy: str) -> tuple[Trace, Trace]:
        async with simulated_router(ONE) as router:
            seen = [Arrival(5.0 * n, prompt(16 + 8 * n, 1000 * n), 3 + n % 4) for n in range(20)]
            await router.serve("data_parallel", seen, "seen")
            # The second one comes in the middle of the last step of the first, but for one.
            answer, long = await router.serve(policy, [Arrival(0.0, prompt(16), 4), Arrival(2.8, prompt(400), 1)])
            return answer, long

    (answer, long), (delayed, straight) = run(main("adaptive")), run(main("data_parallel"))
    assert answer.duration_s == pytest.approx(1.16 + 3 * 1.1)
    assert delayed.duration_s > answer.duration_s + 0.4
    assert long.duration_s < straight.duration_s + 1.1
    assert long.decision is not None
    assert long.decision.chosen.hold_s > 0


def test_a_program_in_a_file_runs_too(last_engine: Path) -> None:
    [trace] = serve(TWO, "last_engine", Arrival(0.0, prompt(32), 1), files=[last_engine])
    assert trace.legs[0].engine == "b"
    with pytest.raises(UnknownPolicy):
        serve(TWO, "thrice")


def test_the_same_again_gives_the_same() -> None:
    arrivals = [Arrival(0.3 * number, prompt(40 + 7 * number, 1000 * number), 6) for number in range(20)]
    for policy in ("adaptive", "balanced", "context_aware"):
        assert times(serve(TWO, policy, *arrivals)) == times(serve(TWO, policy, *arrivals))


def test_what_adaptive_expects_of_an_idle_fleet_comes_true() -> None:
    """After it has seen a few requests."""

    def apart(count: int, begin: float) -> list[Arrival]:
        return [Arrival(begin + 60.0 * n, prompt(40 + 17 * n, 10_000 * n), 4 + n) for n in range(count)]

    async def main() -> list[Trace]:
        async with simulated_router(replace(TWO, engines=dict.fromkeys("ab", EngineHardware()))) as router:
            await router.serve("data_parallel", [replace(each, at_s=each.at_s / 100) for each in apart(12, 0.0)])
            return await router.serve("adaptive", apart(8, 30.0), salt="another")

    for trace in run(main()):
        assert trace.decision is not None
        assert trace.decision.chosen.jct_s == pytest.approx(trace.duration_s, rel=0.1)
