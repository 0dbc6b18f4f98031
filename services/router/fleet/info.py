"""What is known of an engine, as plain values."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.router.fleet.cached_blocks import CachedBlocks
from services.router.fleet.underway import Underway
from services.router.request import ModelKey, PolicyRequest


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself."""

    name: str
    incarnation: bytes
    contract_version: str
    model: ModelKey
    page_size: int  # tokens
    max_context: int  # tokens, prompt plus output
    vocab_size: int
    max_batch_size: int
    can_transfer: bool  # whether it runs with a KV transfer service
    labels: Mapping[str, str] = field(default_factory=dict)
    raw: bytes = field(default=b"", repr=False)  # GetInfoResponse as it came, to show to operators


@dataclass(frozen=True, slots=True)
class WorkDone:
    """All that an engine has computed since it began, see engine.v1.WorkDone."""

    busy_s: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0  # in pieces of more than one
    prompt_context: int = 0  # tokens before each of them, summed
    rows: int = 0  # pieces of one token
    row_context: int = 0  # tokens before each of these, summed


@dataclass(frozen=True, slots=True)
class Load:
    """An engine's load report: sequences, tokens of prompt not computed yet, pages that could be had."""

    running: int = 0
    waiting: int = 0
    waiting_for_kv: int = 0
    queued_tokens: int = 0
    context_tokens: int = 0
    usable_pages: int = sys.maxsize  # before the first report: nothing is known to be missing
    draining: bool = False
    work: WorkDone = field(default_factory=WorkDone)
    raw: bytes = field(default=b"", repr=False)  # WatchLoadResponse as it came

    @property
    def sequences(self) -> int:
        """Sequences in the engine, whatever they wait for."""
        return self.running + self.waiting + self.waiting_for_kv


@dataclass(frozen=True, slots=True)
class InFlight:
    """What was asked of an engine and has not come yet."""

    sequences: int = 0
    prompt_tokens: int = 0  # to be computed: of sends, and of sequences without a first token


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """An engine at one moment: all that choosing may depend on.

    `blocks` and `underway` are shared with the fleet, which goes on changing them; policies only read them.
    """

    address: str
    info: EngineInfo
    load: Load
    sequences: int  # there
    prompt_tokens: int  # of prompts that wait to be computed there
    blocks: CachedBlocks
    underway: Underway = field(default_factory=Underway)
    others: InFlight = field(default_factory=InFlight)  # what others than this router have it do

    def cached_prefix(self, request: PolicyRequest) -> int:
        """Tokens of the prompt that are cached there, as far as its events have told."""
        page_size = self.info.page_size
        return page_size * self.blocks.longest_prefix(request.block_hashes(page_size))
