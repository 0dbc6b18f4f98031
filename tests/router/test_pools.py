"""Divisions of labour, for engines of which all is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.router.cost.pools import Demand, best_pools

# As in bench/policies/paper.py: 70B parameters on four H100 an engine, 3000 tokens in and 100 out, 4 requests/s.
LARGE = Demand(
    num_engines=2,
    prefill=0.65,
    tokens_per_s=400.0,
    prompt_s=0.17,
    output=100.0,
    step_s=8.5e-3,
    row_s=1.1e-4,
    move_s=8e-3,
)
# SmolLM2-135M in int8 on a core each, 384 tokens in and 16 out.
SMALL = Demand(
    num_engines=2,
    prefill=0.8,
    tokens_per_s=80.0,
    prompt_s=0.18,
    output=16.0,
    step_s=9.5e-3,
    row_s=2.3e-3,
    move_s=15e-3,
)


def test_prompts_are_kept_away_from_long_answers_whose_steps_are_cheap_together() -> None:
    pools = best_pools(LARGE, 0)
    assert pools.num_prefill == 1
    assert pools.split >= 0.9
    assert pools.prefill.share > 0.55
    assert pools.decode.held_up < 0.1
    together = best_pools(replace(LARGE, move_s=10.0), 0)
    assert together.num_prefill == 0
    assert pools.jct_s < 0.92 * together.jct_s


def test_work_for_one_engine_holds_up_as_many_as_queueing_theory_says() -> None:
    """One engine that does nothing else is a queue of type M/M/1; of many, one is idle."""
    alone = best_pools(replace(LARGE, prefill=0.5, move_s=0.0), 1).prefill
    share = alone.share
    assert alone.wait == pytest.approx(share / (1 - share))
    assert alone.num_behind == pytest.approx(share / (1 - share) ** 2)
    many = best_pools(replace(LARGE, num_engines=32, prefill=16 * 0.5, tokens_per_s=16 * 400.0), 16).prefill
    assert many.num_behind < 0.3 * alone.num_behind


def test_short_answers_and_dear_rows_stay_where_their_prompts_are() -> None:
    for factor in (0.1, 0.5, 1.0, 1.5):
        demand = replace(SMALL, prefill=factor * SMALL.prefill, tokens_per_s=factor * SMALL.tokens_per_s)
        pools = best_pools(demand, 0)
        assert pools.num_prefill == 0
        assert pools.prefill == pools.decode
        assert pools.decode.share == pytest.approx(demand.prefill / 2)


def test_what_one_engine_cannot_compute_is_split() -> None:
    """At 5.6 requests/s plain disaggregation waits, and data parallel holds answers up."""
    pools = best_pools(replace(LARGE, prefill=0.95, tokens_per_s=560.0), 0)
    assert pools.num_prefill == 1
    assert 0.5 < pools.split < 1.0
    assert pools.prefill.share == pytest.approx(0.95 * pools.split)
    assert pools.decode.share == pytest.approx(0.95 * (1 - pools.split))


def test_more_than_the_engines_can_do_is_shared_by_all() -> None:
    assert best_pools(replace(LARGE, prefill=1.97), 0).num_prefill == 0


def test_answers_are_not_crowded_together_where_few_are_decoded_at_once() -> None:
    long = replace(LARGE, prefill=0.5, tokens_per_s=1200.0, output=400.0)
    assert best_pools(long, 0).num_prefill == 1
    assert best_pools(replace(long, max_sequences=64), 0).num_prefill == 1
    assert best_pools(replace(long, max_sequences=12), 0).num_prefill == 0
    # Nor where nothing would help.
    assert best_pools(replace(long, max_sequences=1), 1).num_prefill == 0


def test_a_division_stays_until_another_is_clearly_better() -> None:
    """Traffic in which both are about as good: who does what must not change with each look."""
    sizes = {now: [_size(now, prefill / 100) for prefill in range(1, 100)] for now in (0, 1)}
    alike = [prefill for prefill, (zero, one) in enumerate(zip(*sizes.values(), strict=True)) if zero != one]
    assert alike, "somewhere it depends on what there is"
    for prefill in alike:
        assert (sizes[0][prefill], sizes[1][prefill]) == (0, 1)


def _size(now: int, prefill: float) -> int:
    demand = replace(LARGE, prefill=prefill, tokens_per_s=prefill / LARGE.prefill * LARGE.tokens_per_s)
    return best_pools(demand, now).num_prefill


@pytest.mark.parametrize("num_engines", [2, 3, 4, 16, 100, 1000])
def test_a_pool_has_room_for_the_prompts_and_leaves_engines_for_the_answers(num_engines: int) -> None:
    scale = num_engines / 2
    for prefill in (0.2, 0.65, 0.9, 1.2):
        tokens_per_s = scale * prefill / LARGE.prefill * LARGE.tokens_per_s
        pools = best_pools(
            replace(LARGE, num_engines=num_engines, prefill=scale * prefill, tokens_per_s=tokens_per_s), 0
        )
        assert 0 <= pools.num_prefill < num_engines
        assert pools.prefill.share < 1
        assert pools.decode.share < 1
        spent = pools.num_prefill * pools.prefill.share + (num_engines - pools.num_prefill) * pools.decode.share
        assert spent == pytest.approx(scale * prefill)


def test_of_many_engines_with_little_to_do_each_finds_one_that_is_idle() -> None:
    """Two get in each other's way where sixteen do not."""
    little = replace(LARGE, prefill=0.26, tokens_per_s=160.0)
    assert best_pools(little, 0).num_prefill == 1
    many = replace(little, num_engines=16, prefill=8 * little.prefill, tokens_per_s=8 * little.tokens_per_s)
    pools = best_pools(many, 0)
    assert pools.num_prefill == 0
    assert pools.decode.held_up < 0.5 * pools.decode.share


@pytest.mark.parametrize("num_engines", [2, 16])
def test_costs_that_were_found_to_be_nothing_are_costs_too(num_engines: int) -> None:
    """What engines tell may fit best so."""
    for nothing in ("step_s", "row_s", "move_s", "prompt_s"):
        pools = best_pools(replace(LARGE, num_engines=num_engines, **{nothing: 0.0}), 1)
        assert 0 <= pools.num_prefill < num_engines
