"""A reservation's lease is kept alive, by a clock of the test's own."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from services.protocol.errors import ReservationGone, ServiceError
from services.protocol.ranges import TokenRange
from services.router.cleanup import Cleanup
from services.router.errors import EngineLost
from services.router.fleet.port import ReservedKv
from services.router.fleet.reservation import Reservation
from services.router.fleet.underway import Answer
from services.router.values import Timing
from services.rpc.virtual_loop import run
from tests.router.test_fleet import snapshot

LEASE_S = 30.0
SEND_S = 10 * LEASE_S


class Receiver:
    """The one call of an engine that counts here; notes when it was renewed."""

    def __init__(self, *errors: ServiceError) -> None:
        self.errors = list(errors)  # of the first calls
        self.num_calls = 0
        self.renewed_at_s: list[float] = []

    async def renew(self, kv: ReservedKv, *, timeout_s: float) -> float:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        self.renewed_at_s.append(asyncio.get_running_loop().time())
        return kv.lease_s


def send_to(receiver: Receiver) -> list[float]:
    """Seconds between two moments at which the lease began anew, while a send goes on."""

    async def work() -> list[float]:
        loop = asyncio.get_running_loop()
        receiver.renewed_at_s.append(loop.time())
        kv = ReservedKv("reservation", b"secret", b"", TokenRange(0, 8), LEASE_S, Timing())
        reservation = Reservation(snapshot("a"), kv, Answer(8.0), receiver, Cleanup(1.0))  # type: ignore[arg-type]
        await asyncio.sleep(SEND_S)
        reservation.used_up()
        return [later - before for before, later in pairwise([*receiver.renewed_at_s, loop.time()])]

    return run(work())


def test_it_is_renewed_long_before_it_ends() -> None:
    assert max(send_to(Receiver())) <= LEASE_S / 3


def test_a_renewal_that_is_lost_is_tried_again_in_time() -> None:
    assert max(send_to(Receiver(EngineLost("nobody answered"), EngineLost("nor now")))) < LEASE_S


def test_what_has_expired_is_not_renewed_for_ever() -> None:
    receiver = Receiver(ReservationGone("the reservation expired"))
    assert send_to(receiver) == [SEND_S]
    assert receiver.num_calls == 1


class SlowReceiver(Receiver):
    """Answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def renew(self, kv: ReservedKv, *, timeout_s: float) -> float:
        self.asked.set()
        await self.may_answer.wait()
        return await super().renew(kv, timeout_s=timeout_s)


def test_a_renewal_that_ends_when_a_sequence_decodes_is_the_last() -> None:
    async def work() -> int:
        receiver = SlowReceiver()
        kv = ReservedKv("reservation", b"secret", b"", TokenRange(0, 8), LEASE_S, Timing())
        reservation = Reservation(snapshot("a"), kv, Answer(8.0), receiver, Cleanup(60.0))  # type: ignore[arg-type]
        await receiver.asked.wait()
        reservation.in_use()
        receiver.may_answer.set()
        await asyncio.sleep(SEND_S)
        reservation.used_up()
        return receiver.num_calls

    assert run(work()) == 1
