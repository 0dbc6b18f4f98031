"""The socket that descriptors pass over, seen by those who should not get any."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
import pytest_asyncio

from services.kvtransfer.control import ControlPage
from services.kvtransfer.errors import InvalidPool
from services.kvtransfer.handover import HandoverSocket
from services.kvtransfer.liveness import EngineConnection
from services.kvtransfer.memory import SharedSegment
from services.rpc.fd_passing import FdPassingError, Message, receive_message, send_message, to_address
from services.rpc.pool_client import AttachedPool, Handover, PoolAttachError


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


@pytest_asyncio.fixture(loop_scope="session")
async def handover() -> AsyncIterator[HandoverSocket]:
    server = HandoverSocket()
    yield server
    server.close()


def client(handover: HandoverSocket) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    connection.connect(to_address(handover.path))
    return connection


def test_descriptors_pass_and_are_closed_on_exec(ends: tuple[socket.socket, socket.socket]) -> None:
    read_end, write_end = os.pipe()
    send_message(ends[0], b"two", (read_end, write_end))
    message = receive_message(ends[1])
    assert message.payload == b"two"
    os.write(message.descriptors[1], b"x")
    assert os.read(read_end, 1) == b"x"
    assert not any(os.get_inheritable(descriptor) for descriptor in message.descriptors)
    message.close()
    message.close()
    os.close(read_end)
    os.close(write_end)


def test_too_long_a_message(ends: tuple[socket.socket, socket.socket]) -> None:
    read_end, write_end = os.pipe()
    send_message(ends[0], b"x" * 5000, (read_end,))
    with pytest.raises(FdPassingError, match="cut short"):
        receive_message(ends[1])
    os.close(read_end)
    with pytest.raises(BrokenPipeError):  # nobody has the end that came with it
        os.write(write_end, b"x")
    os.close(write_end)


def test_the_other_end_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].close()
    with pytest.raises(FdPassingError, match="closed"):
        receive_message(ends[1])


async def test_a_stranger_is_turned_away(handover: HandoverSocket) -> None:
    loop = asyncio.get_running_loop()
    with client(handover) as stranger:
        send_message(stranger, b"no such ticket", (0, 1, 2))
        assert await loop.sock_recv(stranger, 10) == b""


async def test_a_withdrawn_ticket(handover: HandoverSocket) -> None:
    loop = asyncio.get_running_loop()
    ticket = handover.invite(lambda _connection, _message: pytest.fail("accepted"))
    handover.withdraw(ticket)
    handover.withdraw(ticket)
    with client(handover) as late:
        send_message(late, ticket)
        assert await loop.sock_recv(late, 10) == b""


async def test_a_silent_stranger_does_not_keep_others_out(handover: HandoverSocket) -> None:
    accepted: asyncio.Future[EngineConnection] = asyncio.get_running_loop().create_future()

    def accept(connection: EngineConnection, message: Message) -> None:
        accepted.set_result(connection)

    with client(handover), client(handover) as guest:
        send_message(guest, handover.invite(accept))
        engine = await accepted
        assert engine.process_id == os.getpid()
        gone = asyncio.Event()
        engine.watch(gone.set)
        assert not engine.is_gone()
        # What an engine has no business to send is dropped.
        guest.send(b"noise")
        assert not engine.is_gone()
        guest.close()
        assert engine.is_gone()
        await gone.wait()
        assert engine.is_gone()


def test_an_answer_of_another_version() -> None:
    good = Handover(4096, 2).encode()
    assert Handover.decode(good) == Handover(4096, 2)
    for bad in (b"", good[:-1], b"MSP9" + good[4:]):
        with pytest.raises(PoolAttachError):
            Handover.decode(bad)


def test_memory_goes_with_its_last_view() -> None:
    segment = SharedSegment.create("microserve-test-view", 1 << 16, prefault=True)
    view = segment.array[100:200]
    view[:] = 7
    segment.close()
    segment.close()
    assert (view == 7).all()
    assert _mapped()
    del view
    gc.collect()
    assert not _mapped()


def _mapped() -> bool:
    with open("/proc/self/maps") as maps:
        return "microserve-test-view" in maps.read()


@pytest.mark.parametrize("is_allocated", [True, False])
async def test_an_engine_takes_no_memory_that_the_service_left_unallocated(
    ends: tuple[socket.socket, socket.socket], is_allocated: bool
) -> None:
    segment, control = (
        SharedSegment.create("microserve-test", 1 << 20, prefault=is_allocated),
        ControlPage.create("c", 4),
    )
    descriptors = (segment.descriptor, control.descriptor, control.eventfd)
    message = Message(b"", tuple(map(os.dup, descriptors)))
    pool = AttachedPool(ends[0], Handover(1 << 20, 4), message, None)
    assert os.fstat(segment.descriptor).st_blocks * 512 == (1 << 20 if is_allocated else 0)
    pool.memory[-1] = 7
    assert segment.array[-1] == 7
    pool.close()
    control.close()
    segment.close()


async def test_only_sealed_memory_is_adopted() -> None:
    segment = SharedSegment.create("microserve-test", 4096, prefault=False)
    again = SharedSegment.adopt(os.dup(segment.descriptor), 4096)
    again.array[:] = 9
    assert (segment.array == 9).all()
    unsealed = os.memfd_create("microserve-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    pipe, other_end = os.pipe()
    for descriptor, size_bytes in ((unsealed, 4096), (os.dup(segment.descriptor), 8192), (pipe, 4096)):
        with pytest.raises(InvalidPool):
            SharedSegment.adopt(descriptor, size_bytes)
        with pytest.raises(OSError):
            os.fstat(descriptor)
    # The third descriptor of a pool is an eventfd or nothing.
    with pytest.raises(InvalidPool):
        ControlPage.adopt(os.dup(segment.descriptor), other_end)
    again.close()
    segment.close()


async def test_listeners_hear_of_raised_counters() -> None:
    page = ControlPage.create("microserve-test", 4)
    heard = asyncio.Event()
    with page.listening(heard.set):
        page._slots[2] = np.uint64(5)
        os.eventfd_write(page.eventfd, 1)
        await heard.wait()
    assert [page.ready_layers(slot) for slot in range(page.slot_count)] == [0, 0, 5, 0]
    page.clear()
    assert page.ready_layers(2) == 0
    page.close()
    page.close()
