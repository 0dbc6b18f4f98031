"""A process of a transfer is out of descriptors, or of memory, from a layer boundary on: what it does need not work,
everybody has a typed answer, and once there is room again all goes on."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.cli.process import ServiceProcess
from tests.e2e.errors import outcome
from tests.e2e.suite import prep_recv
from tests.faults.gates import Gate
from tests.faults.test_layer_boundaries import CODES, END, PROMPT, Scene, at_each_boundary, scene

pytestmark = pytest.mark.faults

ANSWERS = (CODES.OK, CODES.UNAVAILABLE, CODES.ABORTED, CODES.RESOURCE_EXHAUSTED)
# Transport, and who runs out. The sender's engine opens a file at every gate of these tests, so it is not among them.
VICTIMS = [("shm", "service"), ("tcp", "sender's service"), ("tcp", "receiver's service"), ("tcp", "receiver")]


def process_of(s: Scene, victim: str) -> ServiceProcess:
    """The victim's process."""
    if victim == "receiver":
        return s.receiver.process
    return s.suite.kvtransfer_of(0 if victim == "sender's service" else 1)


@contextmanager
def exhausted(process: ServiceProcess, kind: int) -> Iterator[None]:
    """Inside, it gets no descriptor, or no more memory than a thread takes."""
    if kind == resource.RLIMIT_NOFILE:
        used = {int(name) for name in os.listdir(f"/proc/{process.pid}/fd")}
        soft = min(set(range(len(used) + 1)) - used)
    else:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + 2**24
    before = resource.prlimit(process.pid, kind)
    resource.prlimit(process.pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, kind, before)


@pytest.mark.parametrize("kind", [resource.RLIMIT_NOFILE, resource.RLIMIT_AS], ids=["descriptors", "memory"])
@pytest.mark.parametrize(("transport", "victim"), VICTIMS, ids=["shm", "tcp-sending", "tcp", "receiver"])
async def test_a_process_runs_out(tmp_path: Path, transport: str, victim: str, kind: int) -> None:
    async with scene(tmp_path, transport) as s:

        async def fault(gate: Gate, salt: str) -> None:
            prepared = await s.prepare(salt)
            sending = s.send(prepared, salt, 20)
            await gate.reached()
            process = process_of(s, victim)
            with exhausted(process, kind):
                gate.open()
                code = await sending
            assert code in ANSWERS
            if code is CODES.OK:
                await s.check_receiver(prepared, salt)
            else:
                await s.give_up(prepared)
            with exhausted(process, kind):
                asked = prep_recv(s.suite, s.receiver, PROMPT, END, lease_s=2, cache_salt=f"{salt} short")
                assert await outcome(asked) in ANSWERS
            assert process.poll() is None

        await at_each_boundary(s, fault)
