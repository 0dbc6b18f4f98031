"""WatchKvEvents tells what enters and leaves the prefix cache."""

from __future__ import annotations

import pytest
from microserve.engine.v1 import engine_pb2 as pb

from services.protocol.hashes import block_hashes, hash_seed
from tests.contract.verbs import (
    PAGE_SIZE,
    prompt_of,
)
from tests.e2e.suite import (
    Engine,
    Suite,
    generate,
    idle,
    load,
    wait_for_load,
)

pytestmark = pytest.mark.slow


class Mirror:
    """What a reader of the events knows."""

    def __init__(self, at: Engine) -> None:
        self._call = at.stub.WatchKvEvents(pb.WatchKvEventsRequest(), timeout=240)
        self.blocks: list[bytes] = []
        self.removed: list[bytes] = []
        self.sequence = 0

    async def begin(self) -> Mirror:
        """Reads the snapshot."""
        while True:
            event = await self._call.read()
            assert event.snapshot
            assert not event.removed
            self.sequence = event.sequence
            self.blocks += [block.value for block in event.stored]
            if event.snapshot_complete:
                assert len(set(self.blocks)) == len(self.blocks)
                return self

    async def follow(self) -> None:
        """Reads one change."""
        event = await self._call.read()
        assert not event.snapshot
        assert event.sequence == self.sequence + 1
        self.sequence = event.sequence
        for block in event.removed:
            self.blocks.remove(block.value)
            self.removed.append(block.value)
        for block in event.stored:
            assert block.value not in self.blocks
            self.blocks.append(block.value)

    def close(self) -> None:
        self._call.cancel()


async def snapshot(at: Engine) -> Mirror:
    mirror = await Mirror(at).begin()
    mirror.close()
    return mirror


async def test_kv_events_name_the_blocks(suite: Suite) -> None:
    at = suite.engines[0]
    digest = (await at.stub.GetInfo(pb.GetInfoRequest())).model_digest
    mirror = await Mirror(at).begin()
    before = set(mirror.blocks)
    expected: set[bytes] = set()
    for salt in ("", "tenant ü"):
        prompt = prompt_of(100, 2)
        result = await generate(suite, at, prompt, max_tokens=30, salt=salt)
        # The last token was never an input: it has no KV.
        tokens = [*prompt, *result.token_ids][:-1]
        hashes = block_hashes(tokens, PAGE_SIZE, hash_seed(digest, salt))
        assert len(hashes) == 8
        while not set(hashes) <= set(mirror.blocks):
            await mirror.follow()
        assert [block for block in mirror.blocks if block in hashes] == hashes, "each after its predecessor"
        expected |= set(hashes)
    assert set(mirror.blocks) - before == expected
    await wait_for_load(at, idle)
    fresh = await snapshot(at)
    assert (fresh.sequence, set(fresh.blocks)) == (mirror.sequence, set(mirror.blocks))
    mirror.close()


async def test_kv_events_tell_of_evictions(suite: Suite) -> None:
    at = suite.engines[2]
    mirror = await Mirror(at).begin()
    for seed in range(8):
        await generate(suite, at, prompt_of(100, 100 + seed), max_tokens=10)
    await wait_for_load(at, idle)
    fresh = await snapshot(at)
    while mirror.sequence < fresh.sequence:
        await mirror.follow()
    mirror.close()
    assert mirror.removed, "24 pages cannot hold eight prompts"
    assert set(mirror.blocks) == set(fresh.blocks)
    assert len(fresh.blocks) == (await load(at.stub)).pages.cached
    assert (await generate(suite, at, prompt_of(100, 100), max_tokens=2)).timing.matched_token_count == 0


# --- reservations -----------------------------------------------------------------------------------------------
