"""Silence, on a clock of the test's own."""

from __future__ import annotations

from services.kvtransfer.transports.tcp.heartbeat import BEAT_INTERVAL_S, SILENCE_LIMIT_S, Heartbeat


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_beat_is_due_after_silence_of_our_own() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock)
    assert not heartbeat.due
    assert heartbeat.wait_s == BEAT_INTERVAL_S
    clock.now_s += BEAT_INTERVAL_S
    assert heartbeat.due
    heartbeat.said()
    assert not heartbeat.due


def test_a_silent_peer_is_lost() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock)
    clock.now_s += SILENCE_LIMIT_S - 0.25
    heartbeat.said()
    assert not heartbeat.lost
    assert heartbeat.wait_s == 0.25
    clock.now_s += 0.25
    assert heartbeat.lost
    assert heartbeat.wait_s == 0.0


def test_whatever_is_heard_counts() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock)
    heartbeat.introduced()
    for _ in range(10):
        clock.now_s += SILENCE_LIMIT_S - 1
        assert not heartbeat.lost
        heartbeat.heard()


def test_a_beat_that_cannot_be_sent_does_not_spin() -> None:
    """In the middle of a frame nothing else can be sent: the next look is an interval away, not at once."""
    clock = Clock()
    heartbeat = Heartbeat(clock)
    clock.now_s += 2 * BEAT_INTERVAL_S
    assert heartbeat.due
    assert heartbeat.wait_s == BEAT_INTERVAL_S


def test_a_stranger_has_no_longer_than_the_limit() -> None:
    """However often it says something: it must say who it is."""
    clock = Clock()
    heartbeat = Heartbeat(clock)
    clock.now_s += SILENCE_LIMIT_S
    heartbeat.heard()
    assert heartbeat.lost
