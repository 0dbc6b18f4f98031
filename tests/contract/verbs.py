"""Short words for what the tests of the engine's rpcs do, and the fleet they do it to."""

from __future__ import annotations

import random
from collections.abc import Sequence

from microserve.engine.v1 import engine_pb2 as pb
from microserve.types.v1 import kv_pb2 as kv

from tests.e2e.suite import (
    OWNER,
    Engine,
    Suite,
)

VOCAB, MAX_CONTEXT, PAGE_SIZE = 512, 4096, 16
# Of the two large engines: nothing that any test computes is ever evicted.
PAGES = 5000
# A longest prompt takes 8 pages of the small engine, so reservations may have 16 of its 24.
SMALL_PAGES, SMALL_CONTEXT = 24, 128


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def ref_of(address: kv.KvAddress) -> pb.ReservationRef:
    return pb.ReservationRef(reservation_id=address.reservation_id, secret=address.secret)


async def release(at: Engine, address: kv.KvAddress, *, publish: bool = False) -> int:
    answer = await at.stub.Release(pb.ReleaseRequest(reservation=ref_of(address), publish=publish), timeout=30)
    return answer.published_token_count


async def reservations(at: Engine, owner_id: str = "") -> list[pb.ReservationInfo]:
    answer = await at.stub.ListReservations(pb.ListReservationsRequest(owner_id=owner_id), timeout=30)
    return list(answer.reservations)


async def info_of(at: Engine, address: kv.KvAddress) -> pb.ReservationInfo:
    (found,) = [info for info in await reservations(at) if info.reservation_id == address.reservation_id]
    return found


async def send_range(
    suite: Suite, at: Engine, prompt: Sequence[int], address: kv.KvAddress, begin: int, end: int
) -> pb.RemoteSendResponse:
    request = pb.RemoteSendRequest(
        owner_id=OWNER,
        request_id=suite.new_id(),
        prompt_token_ids=prompt,
        range=kv.TokenRange(begin=begin, end=end),
        address=address,
        attempt=1,
    )
    return await at.stub.RemoteSend(request, timeout=60)


def ranges(infos: Sequence[kv.TokenRange]) -> list[tuple[int, int]]:
    return [(one.begin, one.end) for one in infos]


# --- what an engine says of itself ------------------------------------------------------------------------------
