"""Engines and requests for tests of costs, and a book that has seen many steps of them: synthetic, and pure."""

from __future__ import annotations

import random
from dataclasses import replace

from services.protocol.ranges import TokenRange
from services.protocol.timing import Timing
from services.router.cost.book import CostBook
from services.router.fleet.cached_blocks import CachedBlocks, KvEvent
from services.router.fleet.info import EngineInfo, EngineSnapshot, InFlight, Load, WorkDone
from services.router.request import ModelKey, PolicyRequest
from services.router.values import Sampling

MODEL = ModelKey("m", b"weights", b"tokens")
PAGE = 16
TOKEN_S, STEP_S, SEQUENCE_S = 2e-3, 30e-3, 4e-3


def snapshot(name: str, load: Load | None = None, **info: object) -> EngineSnapshot:
    described = EngineInfo(
        name=name,
        incarnation=name.encode(),
        contract_version="1.0",
        model=MODEL,
        page_size=PAGE,
        max_context=100_000,
        vocab_size=1000,
        max_batch_size=32,
        can_transfer=True,
    )
    load = load or Load(usable_pages=10_000)
    others = InFlight(load.sequences, load.queued_tokens)
    return EngineSnapshot(
        f"{name}:1",
        replace(described, **info),
        load,
        load.sequences,
        load.queued_tokens,
        CachedBlocks(),
        others=others,
    )


def request(length: int = 1024, output: int = 32) -> PolicyRequest:
    sampling = Sampling(max_tokens=output, ignore_eos=True)
    return PolicyRequest("r", MODEL, tuple(range(length)), sampling)


def cache(engine: EngineSnapshot, asked: PolicyRequest, tokens: int) -> None:
    stored = tuple(asked.block_hashes(PAGE)[: tokens // PAGE])
    engine.blocks.apply(KvEvent(1, snapshot=True, snapshot_complete=True, stored=stored))


def prefill_s(tokens: int) -> float:
    return TOKEN_S * tokens


def step_s(sequences: float) -> float:
    return STEP_S + SEQUENCE_S * sequences


def measured(
    *engines: EngineSnapshot, factor: float = 1.0, book: CostBook | None = None, spread: float = 0.05, seed: int = 1
) -> CostBook:
    """A book in which each engine has told of many steps of every kind, `factor` times slower than the above, give or
    take a share of `spread`."""
    book, source = book or CostBook(lambda: 0.0), random.Random(seed)
    done = {engine.address: WorkDone() for engine in engines}
    for _ in range(60):
        for engine in engines:
            tokens, rows, noise = (
                source.choice((0, 64, 256, 512)),
                source.randrange(8),
                source.uniform(1 - spread, 1 + spread),
            )
            before = done[engine.address]
            done[engine.address] = WorkDone(
                busy_s=before.busy_s + factor * noise * (prefill_s(tokens) + step_s(rows)),
                steps=before.steps + 1,
                prompt_tokens=before.prompt_tokens + tokens,
                prompt_context=before.prompt_context + tokens * source.randrange(1000),
                rows=before.rows + rows,
                row_context=before.row_context + rows * source.randrange(500),
            )
            book.reported(replace(engine, load=replace(engine.load, work=done[engine.address])))
            for other in engines:
                sent = Timing(transferred_bytes=1000 * max(1, tokens), queue_s=0.1)
                elapsed_s = noise * (4e-3 + 1e-5 * max(1, tokens)) + 0.1
                book.sent(engine, other, TokenRange(0, max(1, tokens)), sent, elapsed_s)
    return book
