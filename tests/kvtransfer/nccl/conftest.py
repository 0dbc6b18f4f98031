from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from services.kvtransfer.pool import Pool
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.nccl.scene import Scene
from tests.kvtransfer.port import PATIENCE_S, DirectPort


@pytest_asyncio.fixture(loop_scope="session")
async def scene(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    # The memory of these pools stands for device memory.
    monkeypatch.setattr(Pool, "device_address", property(lambda pool: pool.pages.ctypes.data))
    near, far = DirectPort(), DirectPort(drain_timeout_s=PATIENCE_S)
    sender, receiver = FakeEngine(near, "p"), FakeEngine(far, "d")
    scene = Scene(near, far, await sender.start(seed=1), await receiver.start())
    yield scene
    await scene.source.close()
    await scene.sink.close()
    scene.copiers.shutdown()
    sender.close()
    receiver.close()
    await near.close()
    await far.close()
