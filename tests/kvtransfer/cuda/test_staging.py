"""Bytes of device memory are hashed as if they lay in host memory, however little of it they pass through."""

from __future__ import annotations

import numpy as np
import pytest

from services.kvtransfer.checksum import checksum_of
from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.transports.cuda_ipc.staging import Staging
from tests.kvtransfer.cuda.fake_device import FakeDevice
from tests.kvtransfer.pattern import pattern


@pytest.mark.parametrize("lengths", [(), (1,), (64,), (65,), (1, 63, 1), (200, 3, 0, 61), (5, 128, 59)])
def test_what_is_staged_in_parts_has_the_checksum_of_the_whole(lengths: tuple[int, ...]) -> None:
    device = FakeDevice()
    address = device.allocate(1000)
    device.memory[address][:] = pattern(1, 1000)
    offsets = [7 + 230 * index for index in range(len(lengths))]
    places = [(address + offset, length) for offset, length in zip(offsets, lengths, strict=True)]
    memory = device.memory[address].data
    wanted = checksum_of(memory[at : at + length] for at, length in zip(offsets, lengths, strict=True))
    assert Staging(device, 64).checksum(places) == wanted


def test_no_more_is_read_at_once_than_there_is_memory_for() -> None:
    device = FakeDevice()
    address = device.allocate(1000)
    staging = Staging(device, 64)
    staging.checksum([(address, 1000)])
    assert device.log == ["read 64"] * 15 + ["read 40"]


def test_a_gpu_that_fails_is_told_and_the_next_read_is_right() -> None:
    device = FakeDevice()
    address = device.allocate(100)
    staging = Staging(device, 64)
    device.streams[0].fails = True
    with pytest.raises(DeviceFailed, match="the stream failed"):
        staging.checksum([(address, 100)])
    device.streams[0].fails = False
    assert staging.checksum([(address, 100)]) == checksum_of([np.zeros(100, np.uint8).data])
