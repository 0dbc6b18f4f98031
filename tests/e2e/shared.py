"""A suite that several modules use one after the other, because starting one takes seconds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from microserve.router.v1 import admin_pb2 as admin

from tests.e2e.suite import Suite, idle, wait_for_load

Start = Callable[[], AbstractAsyncContextManager[Suite]]


class SharedSuite:
    """Started when it is first lent, and anew after a borrower who spoiled it."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._running = AsyncExitStack()
        self._suite: Suite | None = None
        self._policy = ""

    @asynccontextmanager
    async def lent(self) -> AsyncIterator[Suite]:
        """AssertionError at the end if a process is gone, something still runs or is held, or the policy is another."""
        if self._suite is None:
            self._suite = await self._running.enter_async_context(self._start())
            self._policy = await current_policy(self._suite)
        whole = False
        try:
            yield self._suite
            await self._check(self._suite)
            whole = True
        finally:
            if not whole:
                await self.close()

    async def close(self) -> None:
        """Stops it. Idempotent."""
        self._suite = None
        await self._running.aclose()

    async def _check(self, suite: Suite) -> None:
        services = [each.process for each in suite.engines] + suite.kvtransfers
        for process in services if suite.router_process is None else [*services, suite.router_process]:
            assert process.poll() is None, f"{process.name} has ended"
        for each in suite.engines:
            await wait_for_load(each, idle)
        assert await current_policy(suite) == self._policy


async def current_policy(suite: Suite) -> str:
    """Of the router; empty without one."""
    if suite.admin is None:
        return ""
    listed = await suite.admin.ListPolicies(admin.ListPoliciesRequest())
    return next(policy.name for policy in listed.policies if policy.current)
