"""Choosing among 1,000 engines with 1,000,000 cached blocks, for a prompt of 8,192 tokens whose hashes are known."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

from bench.router.figures import Figure
from bench.router.suite import Stubs
from services.router.cost.book import CostBook
from services.router.cost.placement import SHORTLIST, Planner
from services.router.fleet import choose
from services.router.fleet.block_index import BlockIndex
from services.router.fleet.breaker import Breaker, BreakerConfig
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, Load
from services.router.fleet.roster import Roster
from services.router.fleet.underway import Answer, Underway
from services.router.request import ModelKey, PolicyRequest

NUM_ENGINES, NUM_BLOCKS, PAGE_SIZE, NUM_TOKENS = 1_000, 1_000_000, 16, 8_192
MAX_SEQUENCES = 8  # of this router on an engine
SHARED_BLOCKS = 64  # of the prompt, that every engine has: a system prompt
MODEL = ModelKey("stub", b"weights", b"vocabulary")


@dataclass(eq=False, slots=True)
class Engine:
    """An engine as the router's Member shows it, without a process behind it."""

    address: str
    info: EngineInfo
    blocks: CachedBlocks
    breaker: Breaker
    load: Load = field(default_factory=Load)
    underway: Underway = field(default_factory=Underway)

    def snapshot(self) -> EngineSnapshot:
        """What is known now."""
        sequences = len(self.underway.answers)
        return EngineSnapshot(self.address, self.info, self.load, sequences, 0, self.blocks, self.underway)

    def run(self, sequences: int) -> None:
        """So many sequences are under way there from now on."""
        self.underway.answers = {Answer(expected=64.0 + number) for number in range(sequences)}


async def measure(_: Stubs, rounds: int) -> list[Figure]:
    """Between two choices the loads of four engines change, as a request that begins and one that ends change them."""
    source = random.Random(0)
    request = PolicyRequest("r", MODEL, tuple(source.choices(range(50_000), k=NUM_TOKENS)))
    index = BlockIndex()
    engines = [_engine(number, request, index, source) for number in range(NUM_ENGINES)]
    roster = Roster(engines, index)
    costs, most_sequences = CostBook(), MAX_SEQUENCES

    def move() -> None:
        for engine in source.sample(engines, 4):
            engine.run(source.randrange(most_sequences))
            roster.moved(engine)

    def plain() -> None:
        choose.pair_by_prefix(request, [engine.snapshot() for engine in engines])

    def place() -> None:
        outlook = costs.outlook(MODEL.digest, roster.snapshots)
        shortlist = roster.shortlist(request, SHORTLIST, (), outlook.prefill_pool)
        Planner(costs, request, [each.snapshot() for each in shortlist], outlook).placements()

    unknown = source.choices(range(50_000), k=NUM_TOKENS - SHARED_BLOCKS * PAGE_SIZE)
    shared = replace(request, prompt=(*request.prompt[: SHARED_BLOCKS * PAGE_SIZE], *unknown))
    for each in (request, shared):
        each.block_hashes(PAGE_SIZE)
    shared_us = _median_us(lambda: roster.pair_by_prefix(shared, ()), move, 200 * rounds)
    prefix_us = _median_us(lambda: roster.pair_by_prefix(request, ()), move, 200 * rounds)
    load_us = _median_us(lambda: roster.least_loaded(()), move, 200 * rounds)
    plain_us = _median_us(plain, move, 2 * rounds)
    place_us = _median_us(place, move, 200 * rounds)
    what = f"{NUM_ENGINES:,} engines with {NUM_BLOCKS:,} blocks, {NUM_TOKENS:,} tokens"
    return [
        Figure("choose_us", f"choosing a pair by cached prefix and load, {what}: median, us", prefix_us, 100.0),
        Figure("choose_shared_us", "the same where all have equally much of the prompt cached", shared_us, 100.0),
        Figure("choose_least_loaded_us", "choosing the least loaded of them", load_us),
        Figure("place_us", "what adaptive does: the cheapest placement over them", place_us),
        Figure("choose_plain_us", "the pair, by looking at each of them", plain_us),
    ]


def _engine(number: int, request: PolicyRequest, index: BlockIndex, source: random.Random) -> Engine:
    info = EngineInfo(f"engine-{number}", b"", "1.0", MODEL, PAGE_SIZE, 1 << 20, 50_000, 64, can_transfer=True)
    hashes = request.block_hashes(PAGE_SIZE)
    # One engine in ten knows more of the prompt than the part that all know.
    known = source.randrange(SHARED_BLOCKS, len(hashes)) if number % 10 == 0 else SHARED_BLOCKS
    others = [source.randbytes(16) for _ in range(NUM_BLOCKS // NUM_ENGINES - known)]
    blocks = CachedBlocks(index)
    blocks.apply(KvEvent(0, snapshot=True, snapshot_complete=True, stored=(*hashes[:known], *others)))
    address = f"10.0.{number // 256}.{number % 256}:50051"
    return Engine(address, info, blocks, Breaker(address, BreakerConfig()))


def _median_us(choosing: Callable[[], object], between: Callable[[], None], times: int) -> float:
    taken = []
    for _ in range(times):
        between()
        begin = time.perf_counter()
        choosing()
        taken.append(time.perf_counter() - begin)
    return median(taken) * 1e6
