"""A GPU that fails as a whole ends the service, because nothing of it can work in this process again."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from services.kvtransfer import process
from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.transports.cuda_ipc import gpu
from services.rpc.cuda_driver import CudaDriver
from tests.kvtransfer.cuda.fake_libcuda import FakeLibcuda
from tests.kvtransfer.port import PATIENCE_S, DirectPort


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibcuda:
    library = FakeLibcuda()
    monkeypatch.setattr(gpu, "CudaDriver", lambda ordinal: CudaDriver(ordinal, library))
    monkeypatch.setattr(gpu, "_PROBE_INTERVAL_S", 0.0)
    return library


async def test_it_is_noticed_though_nothing_is_moved(library: FakeLibcuda) -> None:
    port = DirectPort(cuda_device=0)
    losing = asyncio.create_task(port.service.lost())
    library.asked.clear()
    assert await asyncio.to_thread(library.asked.wait, PATIENCE_S)
    assert not losing.done()
    library.failing["cuStreamQuery"] = 719
    assert await asyncio.wait_for(losing, PATIENCE_S) == "cuStreamQuery: fake error 719"
    await port.close()


async def test_it_ends_the_process_with_a_line(library: FakeLibcuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "REGISTRY", CollectorRegistry())
    library.failing["cuStreamQuery"] = 719
    config = KvTransferConfig(listen="127.0.0.1:0", cuda_device=0, copy_kernel=False)
    with pytest.raises(DeviceFailed, match="the GPU is lost: cuStreamQuery: fake error 719"):
        await asyncio.wait_for(process.serve(config), PATIENCE_S)
