"""Silence, on a clock of the test's own."""

from __future__ import annotations

import socket

from services.kvtransfer.transports.tcp.channel import Channel
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


def test_our_own_standing_still_is_no_silence() -> None:
    """The peer may have stood still with us, and comes only after us."""
    clock = Clock()
    heartbeat = Heartbeat(clock)
    clock.now_s += 3 * SILENCE_LIMIT_S
    heartbeat.look()
    assert not heartbeat.lost
    for _ in range(int(SILENCE_LIMIT_S / BEAT_INTERVAL_S) - 1):
        assert not heartbeat.lost
        clock.now_s += BEAT_INTERVAL_S
        heartbeat.look()
    assert heartbeat.lost


def test_silence_begins_when_something_was_heard() -> None:
    """Also after a long time without a look, in which much was heard."""
    clock = Clock()
    heartbeat = Heartbeat(clock)
    heartbeat.introduced()
    clock.now_s += 3 * SILENCE_LIMIT_S
    heartbeat.heard()
    heartbeat.look()
    assert heartbeat.wait_s <= BEAT_INTERVAL_S
    clock.now_s += SILENCE_LIMIT_S
    assert heartbeat.lost


def test_a_connection_outlives_a_stop_of_the_whole_machine() -> None:
    clock, far = Clock(), socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as listener, far:
        far.connect(listener.getsockname())
        channel = Channel(listener.accept()[0], clock)
        channel.introduced()
        far.sendall(b"x")
        clock.now_s += 3 * SILENCE_LIMIT_S
        channel.wait(to_send=False)
        assert channel.receive([memoryview(bytearray(2))]) == 1
        channel.close()


def test_a_stop_between_the_wait_and_the_introduction_is_no_silence() -> None:
    clock, far = Clock(), socket.socket()
    with socket.create_server(("127.0.0.1", 0)) as listener, far:
        far.connect(listener.getsockname())
        channel = Channel(listener.accept()[0], clock)
        far.sendall(b"x")
        channel.wait(to_send=False)
        clock.now_s += 3 * SILENCE_LIMIT_S
        assert channel.receive([memoryview(bytearray(2))]) == 1
        channel.close()
