"""Choosing among many engines as choose.py does among few, without looking at each of them.

Loads stand in arrays that are brought up to date only where something has changed; prefixes are found in the fleet's
BlockIndex by bisecting once for all engines. choose.py is what this is held equal to.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from services.router.errors import NoEngine
from services.router.fleet import choose
from services.router.fleet.block_index import BlockIndex
from services.router.fleet.breaker import Breaker, BreakerState
from services.router.fleet.info import EngineSnapshot
from services.router.request import PolicyRequest

Positions: TypeAlias = npt.NDArray[np.intp]  # (num_engines,) of places in the roster


class Listed(Protocol):
    """What a roster needs of an engine."""

    address: str
    breaker: Breaker

    def snapshot(self) -> EngineSnapshot:
        """What is known of it now."""


Item = TypeVar("Item", bound=Listed)


@dataclass(frozen=True, slots=True)
class _Group:
    """Engines to choose from: their places, and their slots as bits for each page size."""

    positions: Positions
    slots: dict[int, int]


@dataclass(frozen=True, slots=True)
class _Candidates:
    """All that may be chosen, and those of each role where there are two of them."""

    everyone: _Group
    prefill: _Group | None
    decode: _Group | None


class Roster(Generic[Item]):
    """The engines of one model, for as long as they stay the same. Equal ones are told apart by name and address."""

    def __init__(self, engines: Collection[Item], index: BlockIndex) -> None:
        snapshots = {engine: engine.snapshot() for engine in engines}
        self._engines = sorted(engines, key=lambda engine: choose.name(snapshots[engine]))
        self._positions = {engine: position for position, engine in enumerate(self._engines)}
        self._index = index
        infos = [snapshots[engine].info for engine in self._engines]
        self._able = np.array([info.can_transfer for info in infos], bool)
        self._roles = np.array([info.labels.get(choose.ROLE, "") for info in infos], object)
        self._page_sizes = np.array([info.page_size for info in infos], np.int64)
        self._slots = np.array([snapshots[engine].blocks.slot for engine in self._engines], np.intp)
        self._position_of_slot = np.zeros(self._slots.max(initial=-1) + 1, np.intp)
        self._position_of_slot[self._slots] = np.arange(len(infos))
        self._sequences = np.zeros(len(infos))  # for the engine's size
        self._prompt_tokens = np.zeros(len(infos), np.int64)
        self._moved: set[Item] = set(self._engines)
        self._opened: set[Item] = set()  # whose breaker is not closed
        self._all = self._candidates(frozenset())

    def moved(self, engine: Item) -> None:
        """Its load has changed, or its breaker has opened."""
        self._moved.add(engine)

    def least_loaded(self, avoided: Collection[str]) -> Item:
        """As choose.least_loaded, but for engines at these addresses. NoEngine."""

        def choice(among: _Candidates) -> tuple[int]:
            return (self._least(among.everyone.positions, self._sequences, self._prompt_tokens),)

        return self._choose(choice, avoided)[0]

    def pair(self, avoided: Collection[str]) -> tuple[Item, Item]:
        """As choose.pair. NoPair."""

        def choice(among: _Candidates) -> tuple[int, int]:
            prefill, decode = self._roles_of(among)
            return (
                self._least(prefill.positions, self._prompt_tokens),
                self._least(decode.positions, self._sequences, self._prompt_tokens),
            )

        prefill, decode = self._choose(choice, avoided)
        return prefill, decode

    def pair_by_prefix(self, request: PolicyRequest, avoided: Collection[str]) -> tuple[Item, Item]:
        """As choose.pair_by_prefix. NoPair."""

        def choice(among: _Candidates) -> tuple[int, int]:
            prefill, decode = self._roles_of(among)
            return (
                self._least(self._most_cached(request, prefill), self._prompt_tokens),
                self._least(self._most_cached(request, decode), self._sequences, self._prompt_tokens),
            )

        prefill, decode = self._choose(choice, avoided)
        return prefill, decode

    def shortlist(self, request: PolicyRequest, count: int, avoided: Collection[str]) -> list[Item]:
        """Those that any good choice is among: `count` with the fewest sequences for their size, with the fewest prompt
        tokens to compute, and with most of the prompt cached each; all where there are hardly more. NoEngine."""

        def choice(among: _Candidates) -> tuple[int, ...]:
            positions = among.everyone.positions
            if len(positions) <= 3 * count:
                return tuple(positions)
            lists = [
                self._few(positions, count, self._sequences, self._prompt_tokens),
                self._few(positions, count, self._prompt_tokens),
            ]
            holders = self._most_cached(request, among.everyone)
            if len(holders) < len(positions):
                lists.append(self._few(holders, count, self._sequences, self._prompt_tokens))
            return tuple(np.unique(np.concatenate(lists)))

        return self._choose(choice, avoided)

    @staticmethod
    def _few(positions: Positions, count: int, *keys: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Positions:
        """`count` of these places with the least first keys, of equal ones the least second, and so on."""
        return positions[np.lexsort([key[positions] for key in reversed(keys)])[:count]]

    def _choose(self, choice: Callable[[_Candidates], tuple[int, ...]], avoided: Collection[str]) -> list[Item]:
        """What `choice` says of those that may be chosen now. NoEngine."""
        self._refresh()
        shut = {self._positions[engine] for engine in self._opened if not engine.breaker.admits}
        if avoided:
            shut |= {position for position, engine in enumerate(self._engines) if engine.address in avoided}
        among = self._candidates(shut) if shut else self._all
        if not len(among.everyone.positions):
            raise NoEngine("no healthy engine serves this model", retry_delay_s=1.0)
        return [self._engines[position] for position in choice(among)]

    def _refresh(self) -> None:
        self._opened = {engine for engine in self._opened if engine.breaker.state is not BreakerState.CLOSED}
        for engine in self._moved:
            position = self._positions.get(engine)
            if position is None:
                continue
            snapshot = engine.snapshot()
            self._sequences[position] = choose.relative_sequences(snapshot)
            self._prompt_tokens[position] = snapshot.prompt_tokens
            if engine.breaker.state is not BreakerState.CLOSED:
                self._opened.add(engine)
        self._moved.clear()

    def _candidates(self, shut: Collection[int]) -> _Candidates:
        everyone = np.delete(np.arange(len(self._engines)), list(shut))
        able = everyone[self._able[everyone]]
        if len(able) < 2:
            return _Candidates(self._group(everyone), None, None)
        prefill, decode = (able[self._roles[able] == role] for role in (choose.PREFILL, choose.DECODE))
        if not len(prefill) or not len(decode):
            prefill, decode = able[: len(able) // 2], able[len(able) // 2 :]
        return _Candidates(*map(self._group, (everyone, prefill, decode)))

    def _group(self, positions: Positions) -> _Group:
        slots = {}
        for page_size in np.unique(self._page_sizes[positions]):
            bits = np.zeros(len(self._position_of_slot), np.uint8)
            bits[self._slots[positions[self._page_sizes[positions] == page_size]]] = 1
            slots[int(page_size)] = int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
        return _Group(positions, slots)

    def _roles_of(self, among: _Candidates) -> tuple[_Group, _Group]:
        if among.prefill is None or among.decode is None:
            choose.roles([self._engines[position].snapshot() for position in among.everyone.positions])
        assert among.prefill is not None
        assert among.decode is not None
        return among.prefill, among.decode

    def _most_cached(self, request: PolicyRequest, group: _Group) -> Positions:
        """Those of a group that have most of the prompt cached; all of them if none has any."""
        most, found = 0, group.positions
        for page_size, slots in group.slots.items():
            hashes = request.block_hashes(page_size)
            num_blocks = bisect_left(hashes, True, key=lambda block: not self._index.holders(block) & slots)
            tokens = num_blocks * page_size
            if tokens and tokens >= most:
                holders = self._at(self._index.holders(hashes[num_blocks - 1]) & slots)
                found = np.union1d(found, holders) if tokens == most else holders
                most = tokens
        return found

    def _at(self, slots: int) -> Positions:
        """Places of the engines of these bits."""
        data = slots.to_bytes((slots.bit_length() + 7) // 8, "little")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        return self._position_of_slot[np.flatnonzero(bits)]

    @staticmethod
    def _least(positions: Positions, *keys: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> int:
        """The place with the least first key, of those the one with the least second key, and so on."""
        if len(positions) == 1:
            return int(positions[0])
        for key in keys:
            values = key[positions]
            positions = positions[values == values.min()]
        return int(positions.min())
