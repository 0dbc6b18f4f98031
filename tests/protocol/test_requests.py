"""What is remembered of calls, and for how long."""

from __future__ import annotations

import pytest

from services.protocol.errors import RequestIdReused
from services.protocol.requests import RequestLedger


def test_live_calls_are_all_remembered_and_of_finished_ones_the_newest() -> None:
    ledger = RequestLedger[str](capacity=2)
    for key in "abcde":
        ledger.begin(key, b"arguments", key)
    for key in "abc":
        ledger.finish(key)
    assert [ledger.find(key, b"arguments") for key in "abcde"] == [None, "b", "c", "d", "e"]
    assert [ledger.live(key) for key in "cd"] == [None, "d"]


def test_an_id_stands_for_its_arguments_while_it_is_remembered() -> None:
    ledger = RequestLedger[str](capacity=1)
    ledger.begin("a", b"arguments", "first")
    for _ in range(2):
        with pytest.raises(RequestIdReused):
            ledger.find("a", b"others")
        ledger.finish("a")
    ledger.begin("a", b"others", "second")
    assert ledger.find("a", b"others") == "second"
