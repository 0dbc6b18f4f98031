"""The rules of grants one by one; test_exhaustive.py has what happens when they meet."""

from __future__ import annotations

import pytest

from services.protocol.errors import (
    AttemptSuperseded,
    GrantConflict,
    InvalidRange,
    OutsideWindow,
    RangeOverlaps,
    ReservationGone,
    WrongSecret,
)
from services.protocol.grants import (
    MAX_TOMBSTONES,
    AlreadyCommitted,
    Attempt,
    Draining,
    GrantKey,
    GrantSpec,
    GrantTable,
    PoolPages,
    prove,
)
from services.protocol.ranges import TokenRange

KEY, OTHER = GrantKey("pool", "r"), GrantKey("pool", "other")
SECRET = b"s" * 16
WINDOW = TokenRange(4, 12)
PAGES = (3, 1)


def spec(key: GrantKey = KEY, pages: tuple[int, ...] = PAGES, others: tuple[PoolPages, ...] = ()) -> GrantSpec:
    return GrantSpec(key, SECRET, WINDOW, pages, others)


def granted() -> GrantTable:
    table = GrantTable()
    table.open_grant(spec())
    return table


def opened(table: GrantTable, begin: int = 4, end: int = 12, number: int = 1, writer: str = "w") -> Attempt:
    attempt = table.open_attempt(KEY, SECRET, TokenRange(begin, end), number, writer)
    assert isinstance(attempt, Attempt)
    return attempt


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (spec(OTHER), GrantConflict),
        (spec(OTHER, (5, 5)), GrantConflict),
        (spec(OTHER, (5, 6), (PoolPages("pool", (7, 8)),)), GrantConflict),
        (GrantSpec(OTHER, SECRET, TokenRange(4, 4), ()), InvalidRange),
        (spec(KEY, (5, 6)), GrantConflict),
    ],
    ids=["pages_of_another", "a_page_twice", "a_pool_twice", "empty", "another_of_the_same_id"],
)
def test_grants_that_are_refused(wrong: GrantSpec, error: type[Exception]) -> None:
    table = granted()
    with pytest.raises(error):
        table.open_grant(wrong)
    table.open_grant(spec())  # once more changes nothing


def test_a_secret_or_its_proof_is_wanted() -> None:
    table, challenge = granted(), b"c" * 16
    table.check(KEY, SECRET)
    table.check_proof(KEY, challenge, prove(SECRET, challenge))
    with pytest.raises(WrongSecret):
        table.open_attempt(KEY, b"x" * 16, WINDOW, 1, "w")
    for proof in (SECRET, prove(b"x" * 16, challenge), prove(SECRET, b"d" * 16)):
        with pytest.raises(WrongSecret):
            table.check_proof(KEY, challenge, proof)


@pytest.mark.parametrize(("begin", "end"), [(3, 12), (4, 13), (0, 2)])
def test_attempts_are_inside_the_window_and_writes_inside_the_attempt(begin: int, end: int) -> None:
    table = granted()
    with pytest.raises(OutsideWindow):
        table.open_attempt(KEY, SECRET, TokenRange(begin, end), 1, "w")
    attempt = opened(table)
    with pytest.raises(OutsideWindow):
        table.begin_write(attempt, TokenRange(begin, end))
    with pytest.raises(InvalidRange):
        table.open_attempt(KEY, SECRET, TokenRange(6, 6), 1, "w")


def test_a_number_is_used_once() -> None:
    table = granted()
    first = opened(table)
    assert opened(table) is first, "its writer joins it"
    for number, writer in ((1, "x"), (0, "w")):
        with pytest.raises(AttemptSuperseded):
            table.open_attempt(KEY, SECRET, WINDOW, number, writer)
    table.end_attempt(first)
    with pytest.raises(AttemptSuperseded):
        table.open_attempt(KEY, SECRET, WINDOW, 1, "w")
    assert opened(table, number=2) is not first
    with pytest.raises(RangeOverlaps):
        table.open_attempt(KEY, SECRET, TokenRange(4, 8), 3, "x")


def test_a_fenced_predecessor_is_waited_for() -> None:
    table = granted()
    old = opened(table)
    table.begin_write(old, WINDOW)
    assert table.open_attempt(KEY, SECRET, WINDOW, 2, "x") is Draining.VALUE
    with pytest.raises(AttemptSuperseded):
        table.begin_write(old, WINDOW)
    table.end_write(old, 1)
    opened(table, number=2, writer="x")


def test_nothing_is_committed_while_it_is_written_or_sent_again() -> None:
    table = granted()
    attempt, half, rest = opened(table), TokenRange(4, 8), TokenRange(8, 12)
    table.begin_write(attempt, rest)
    assert not table.mark_in_place(attempt, WINDOW)
    table.end_write(attempt, 1)
    table.begin_part(attempt, half)
    assert not table.mark_in_place(attempt, rest)
    assert table.mark_in_place(attempt, half)
    assert table.open_attempt(KEY, SECRET, half, 9, "x") is AlreadyCommitted.VALUE


def test_pages_are_let_go_when_the_whole_window_is_committed() -> None:
    table = granted()
    table.mark_in_place(opened(table, 4, 8), TokenRange(4, 8))
    with pytest.raises(GrantConflict):
        table.open_grant(spec(OTHER))
    table.mark_in_place(opened(table, 8, 12), TokenRange(8, 12))
    table.open_grant(spec(OTHER))
    table.revoke(KEY)  # does not take them from whoever has them now
    with pytest.raises(GrantConflict):
        table.open_grant(spec(GrantKey("pool", "third")))


def test_a_revoked_id_opens_nothing_while_its_pool_lasts() -> None:
    table = GrantTable()
    table.revoke(KEY)
    with pytest.raises(ReservationGone):
        table.open_grant(spec())
    table.forget_pool("pool")
    table.open_grant(spec())


def test_of_revoked_ids_the_oldest_are_forgotten() -> None:
    table = GrantTable()
    for number in range(MAX_TOMBSTONES + 1):
        table.revoke(GrantKey("pool", str(number)))
    table.open_grant(spec(GrantKey("pool", "0")))
    with pytest.raises(ReservationGone):
        table.open_grant(spec(GrantKey("pool", str(MAX_TOMBSTONES)), (5, 6)))


def test_a_grant_is_of_all_its_pools() -> None:
    table = GrantTable()
    table.open_grant(spec(others=(PoolPages("second", PAGES),)))
    assert table.keys("pool") == table.keys("second") == (KEY,)
    with pytest.raises(GrantConflict):
        table.open_grant(spec(GrantKey("second", "r")))
    assert [status.key for status in table.statuses("pool")] == [KEY]
    assert table.statuses("second") == ()
