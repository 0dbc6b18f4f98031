"""The small parts: timers, blocks in flight, fault scripts, configuration."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from services.engine.core.account import Account
from services.engine.core.api import RequestKey, writer_id
from services.engine.core.blocks import BlockChain
from services.engine.core.draft import Draft
from services.engine.core.faults import InjectedFault, ScriptedFaults
from services.engine.core.in_flight import InFlightBlocks
from services.engine.core.pace import Pace
from services.engine.core.plan import SampleSpec
from services.engine.core.pool import PagePool
from services.engine.core.sequence import Sequence
from services.engine.core.timers import Timers
from services.engine.sampling.params import SamplingParams
from tests.engine.core.world import make_config


def test_timers_run_in_order_of_time_then_of_asking() -> None:
    timers = Timers()
    ran: list[str] = []

    def again() -> None:
        timers.at(1.5, lambda: ran.append("from one"))

    timers.at(2.0, lambda: ran.append("two"))
    timers.at(1.0, lambda: ran.append("one"))
    timers.at(1.0, again)
    cancelled = timers.at(0.5, lambda: ran.append("never"))
    cancelled.cancel()
    assert timers.next_due() == 1.0
    timers.run_due(1.6)
    assert ran == ["one", "from one"]
    assert timers.next_due() == 2.0
    timers.run_due(5.0)
    cancelled.cancel()
    assert timers.next_due() is None


def test_no_two_requests_write_under_one_name() -> None:
    """Names may hold any character; a shared one would let an owner end another's transfers."""
    keys = [RequestKey("a", "b/c"), RequestKey("a/b", "c"), RequestKey("1/a", "b/c"), RequestKey("a", "1/b/c")]
    assert len({writer_id(b"engine", key) for key in keys}) == len(keys)


def test_blocks_in_flight_end_with_landing_or_with_their_producer() -> None:
    blocks = InFlightBlocks()
    blocks.announce(1, [b"a", b"b"])
    blocks.announce(2, [b"b", b"c"])
    blocks.landed(b"a")
    blocks.landed(b"unknown")
    assert [blocks.contains(name) for name in (b"a", b"b", b"c")] == [False, True, True]
    blocks.withdraw(2)
    assert [blocks.contains(name) for name in (b"b", b"c")] == [True, False]
    blocks.withdraw(1)
    assert not blocks.contains(b"b")


def test_pace_says_how_long_work_takes() -> None:
    pace = Pace()
    assert pace.seconds_for(100) == 1.0
    pace.step(100, 0.5)
    pace.step(100, 0.0)
    assert pace.seconds_for(300) == 1.5
    assert (pace.seconds_for(0), pace.seconds_for(10**9)) == (0.05, 10.0)


def test_fault_scripts_raise_and_hold(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    faults = ScriptedFaults.parse(f"send.layer.2=hold:{fifo}, prep_recv.begin=raise")
    faults.reach("send.layer.1")
    with pytest.raises(InjectedFault):
        faults.reach("prep_recv.begin")
    passed = threading.Event()

    def pass_it() -> None:
        faults.reach("send.layer.2")
        passed.set()

    holder = threading.Thread(target=pass_it)
    holder.start()
    with open(fifo, "wb"):
        assert not passed.is_set()
    assert passed.wait(10)
    holder.join()
    with pytest.raises(ValueError, match="hold:PATH"):
        ScriptedFaults.parse("send.layer.2=explode")


@pytest.mark.parametrize(
    "wrong",
    [{"num_pages": 0}, {"max_context": 1}, {"max_step_tokens": 0}, {"default_lease_s": 0.0}, {"max_lease_s": 1.0}],
)
def test_a_configuration_that_cannot_work(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        make_config(**wrong)  # type: ignore[arg-type]


def test_a_pool_smaller_than_the_context_bounds_it() -> None:
    config = make_config(num_pages=10, max_context=1000)
    assert (config.context_limit, config.max_reserved_pages) == (40, 0)


def test_every_page_that_becomes_free_is_poisoned_before_it_is_handed_out() -> None:
    poisoned: list[int] = []
    pool = PagePool(3, 2, poisoned.extend)
    assert poisoned == [0, 1, 2]
    chain = BlockChain([1, 2, 3, 4], 2, b"")
    pages = pool.take(3)
    poisoned.clear()
    for index in range(2):
        pool.publish(chain, index, pages[index])
    pool.release(pages)
    assert poisoned == [pages[2]]
    assert pool.take(3) == (pages[2], pages[1], pages[0])
    assert poisoned == [pages[2], pages[1], pages[0]]
    pool.quarantine(pages[:1])
    pool.drained(pages[:1])
    assert poisoned[-1] == pages[0]


def test_what_leaves_a_draft_leaves_nothing_behind() -> None:
    chain = BlockChain([1, 2, 3, 4], 2, b"")
    sequence = Sequence(1, RequestKey("a", "b"), chain, Account(0.0), goal=4)
    sequence.pages.extend([7, 8])
    draft = Draft(3)
    draft.admit(sequence)
    draft.copy(sequence, 5, 7)
    draft.add(sequence, draft.end_for(sequence, 2))
    assert (draft.budget, [segment.end for segment in draft.plan().segments]) == (1, [2])
    draft.preempt(sequence)
    plan = draft.plan()
    assert draft.budget == 3
    assert (plan.segments, plan.copies, plan.admitted) == ((), (), ())
    assert (plan.pinned, plan.preempted) == ((5,), (1,))


def test_the_largest_logit_is_enough_for_plain_greedy_alone() -> None:
    tokens = [1, 2, 3]
    assert SampleSpec(SamplingParams(max_tokens=9, seed=4), tokens, 2).takes_largest
    assert SampleSpec(SamplingParams(min_tokens=1), tokens, 2).takes_largest
    assert SampleSpec(SamplingParams(min_tokens=2), tokens, 2, num_awaited=1).takes_largest
    for params in (
        SamplingParams(temperature=0.1),
        SamplingParams(logprobs=0),
        SamplingParams(logit_bias=((1, 1.0),)),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(min_tokens=2),
    ):
        assert not SampleSpec(params, tokens, 2).takes_largest
    assert not SampleSpec(SamplingParams(), tokens, 2, forced_token_id=0).takes_largest
    assert not SampleSpec(SamplingParams(), tokens, 2, allowed=np.zeros(1, dtype=np.uint8)).takes_largest
