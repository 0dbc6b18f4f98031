"""Deadlines, errors and stops: whatever happens, the communicator is aborted once and the caller learns why."""

from __future__ import annotations

import threading

import pytest

from services.kvtransfer.transports.nccl.communicator import Communicator, CommunicatorLost, Patience
from tests.kvtransfer.cuda.fake_device import Copy, FakeDevice
from tests.kvtransfer.nccl.fake_nccl import FakeNccl

TIMEOUT_S = 3.0


class Bench:
    """One end that the test drives; the other end is only as present as the test says. Time passes in pauses."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.nccl = FakeNccl(self.device)
        self.stopped = threading.Event()
        self.now = 0.0
        self.unique_id = self.nccl.unique_id()

    def pause(self) -> None:
        self.now += 1.0

    def connect(self, rank: int = 0, *, alone: bool = False) -> Communicator:
        if not alone:
            self.peer = self.nccl.init(self.unique_id, 1 - rank)
        self.nccl.log.clear()
        patience = Patience(lambda: self.now, self.pause, TIMEOUT_S)
        return Communicator(self.nccl, self.device.new_stream(), self.unique_id, rank, patience, self.stopped)

    def buffer(self, data: bytes = bytes(8)) -> int:
        address = self.device.allocate(len(data))
        self.device.memory[address][:] = list(data)
        return address


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_pages_are_gathered_then_sent_in_one_group(bench: Bench) -> None:
    communicator = bench.connect()
    pool, buffer, there = bench.buffer(b"abcdefgh"), bench.buffer(), bench.buffer()
    bench.nccl.receive(bench.peer, there, 6, 0)
    bench.nccl.log.clear()
    communicator.send([Copy(buffer, pool + 4, 4), Copy(buffer + 4, pool, 2)], buffer, 6)
    assert bytes(bench.device.memory[there][:6]) == b"efghab"
    assert bench.nccl.log == ["group_start", "send 6", "group_end"]
    assert bench.device.log == ["copy 6"]
    communicator.close()
    assert bench.nccl.log[-1] == "abort"
    assert bench.device.log[-1] == "close stream"


def test_a_peer_that_never_comes(bench: Bench) -> None:
    with pytest.raises(CommunicatorLost, match="no answer within 3 s") as caught:
        bench.connect(alone=True)
    assert caught.value.drained
    assert bench.nccl.log == ["init 0", "abort"]


def test_a_receive_that_nobody_answers_is_aborted_at_its_deadline(bench: Bench) -> None:
    communicator = bench.connect(1)
    with pytest.raises(CommunicatorLost, match="no answer within 3 s"):
        communicator.receive(bench.buffer(), 8)
    assert bench.nccl.log[-2:] == ["group_end", "abort"]
    # It answers from then on, and is not aborted again.
    with pytest.raises(CommunicatorLost):
        communicator.receive(bench.buffer(), 8)
    communicator.close()
    assert bench.nccl.log.count("abort") == 1


def test_the_death_of_the_peer_is_seen_before_the_deadline(bench: Bench) -> None:
    communicator = bench.connect(1)
    bench.nccl.broken = True
    begin = bench.now
    with pytest.raises(CommunicatorLost, match="remote process exited"):
        communicator.receive(bench.buffer(), 8)
    assert bench.now == begin
    assert bench.nccl.log[-1] == "abort"


def test_a_stop_from_another_thread_ends_the_call_under_way(bench: Bench) -> None:
    communicator = bench.connect(1)
    bench.pause = bench.stopped.set  # type: ignore[method-assign]
    communicator._patience = Patience(lambda: bench.now, bench.pause, TIMEOUT_S)
    with pytest.raises(CommunicatorLost, match="stopped"):
        communicator.receive(bench.buffer(), 8)
    assert bench.nccl.log[-1] == "abort"


@pytest.mark.parametrize("call", ["init", "group_start", "send", "group_end"])
def test_a_call_that_fails_aborts(bench: Bench, call: str) -> None:
    if call == "init":
        bench.nccl.failing.add(call)
        with pytest.raises(CommunicatorLost, match="init 0 failed"):
            bench.connect(alone=True)
        # There is nothing to abort.
        assert "abort" not in bench.nccl.log
        return
    communicator = bench.connect()
    bench.nccl.failing.add(call)
    with pytest.raises(CommunicatorLost, match="failed"):
        communicator.send([], bench.buffer(), 8)
    assert bench.nccl.log[-1] == "abort"
    # A group that was opened is closed, or the thread's next communicator would queue into it.
    assert bench.nccl.log.count("group_end") == (0 if call == "group_start" else 1)


def test_a_gpu_that_fails_while_the_stream_is_closed_is_told_as_any_other_loss(bench: Bench) -> None:
    communicator = bench.connect()
    bench.device.failing.add("close")
    with pytest.raises(CommunicatorLost, match="closed; close failed"):
        communicator.close()
    with pytest.raises(CommunicatorLost, match="closed"):
        communicator.send([], bench.buffer(), 8)
    assert bench.nccl.log.count("abort") == 1


@pytest.mark.parametrize("how", ["held", "fails"])
def test_a_stream_that_does_not_drain_is_told(bench: Bench, how: str) -> None:
    communicator = bench.connect()
    setattr(bench.device.streams[0], how, True)
    with pytest.raises(CommunicatorLost) as caught:
        communicator.send([Copy(bench.buffer(), bench.buffer(), 8)], bench.buffer(), 8)
    assert not caught.value.drained
    assert "close stream" not in bench.device.log
    with pytest.raises(CommunicatorLost):
        communicator.close()
