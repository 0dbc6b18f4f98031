"""What is paid when a turn begins, and when it has ended."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission.account import MOST_CREDIT, Account, Charge

_TURNS = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.booleans()), max_size=40)


@settings(deadline=None)
@given(_TURNS)
def test_what_was_expected_wrongly_is_made_up_for_and_time_never_goes_back(
    turns: list[tuple[int, int, bool]],
) -> None:
    """Of each turn what was expected, what it cost, and whether all that run end then."""
    account, running, spent, is_capped = Account(weight=4), list[tuple[Charge, int]](), 0, False
    for expected, cost, is_end in turns:
        before = account.time
        running.append((account.charge(expected), cost))
        assert account.time >= before + expected / 2 / 4
        for charge, had in running if is_end else ():
            before = account.time
            charge.settle(had)
            assert account.time >= before
            assert 0 <= account.credit <= MOST_CREDIT
            is_capped |= account.credit == MOST_CREDIT
            spent += had
        running = [] if is_end else running
    for charge, had in running:
        charge.settle(had)
        is_capped |= account.credit == MOST_CREDIT
        spent += had
    assert account.time * 4 >= spent / 2
    if not is_capped:
        assert account.time * 4 - account.credit == pytest.approx(spent)


def test_who_waits_again_has_saved_nothing_up() -> None:
    account = Account()
    account.charge(1000).settle(100)
    account.join(500)  # what it had really is 100, so it is behind
    assert (account.time, account.credit) == (1000, 500)
    account.join(2000)
    assert (account.time, account.credit) == (2000, 0)
