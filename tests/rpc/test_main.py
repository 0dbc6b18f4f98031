"""The event loop of a service's process."""

from __future__ import annotations

import asyncio
import time

from services.rpc.main import ServiceLoop


def test_its_clock_is_the_monotonic_one_and_timers_keep_to_it() -> None:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        begin, fired = loop.time(), loop.create_future()
        loop.call_later(0.01, lambda: fired.set_result(loop.time()))
        return begin, await fired

    before = time.monotonic()
    with asyncio.Runner(loop_factory=ServiceLoop) as runner:
        begin, fired = runner.run(main())
    assert before <= begin
    assert begin + 0.01 <= fired + time.get_clock_info("monotonic").resolution
    assert fired <= time.monotonic()
