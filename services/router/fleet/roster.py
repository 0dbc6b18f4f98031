"""Choosing among many engines as choose.py does among few, without looking at each of them.

Loads stand in arrays that are brought up to date only where something has changed; prefixes are found in the fleet's
BlockIndex by bisecting once for all engines. choose.py is what this is held equal to.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
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

Positions: TypeAlias = npt.NDArray[np.intp]  # (num_engines,) of places in the roster, ascending
Loads: TypeAlias = npt.NDArray[np.int64] | npt.NDArray[np.complex128]  # (num_engines,) by place


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
        self._prefill_loads = np.zeros(len(infos), np.int64)  # prompt tokens
        # Sequences for the engine's size, then prompt tokens: complex numbers are compared so.
        self._decode_loads = np.zeros(len(infos), np.complex128)
        self._pool: frozenset[str] = frozenset()
        self._is_pooled = np.zeros(len(infos), bool)
        self._moved: set[Item] = set(self._engines)
        self._opened = {engine for engine in engines if engine.breaker.state is not BreakerState.CLOSED}
        self._all = self._candidates(frozenset())

    def moved(self, engine: Item) -> None:
        """Its load has changed."""
        self._moved.add(engine)

    def opened(self, engine: Item) -> None:
        """Its breaker has opened."""
        if engine in self._positions:
            self._opened.add(engine)

    def least_loaded(self, avoided: Collection[str]) -> Item:
        """As choose.least_loaded, but for engines at these addresses. NoEngine."""
        return self._least(self._among(avoided).everyone.positions, self._decode_loads)

    def pair(self, avoided: Collection[str]) -> tuple[Item, Item]:
        """As choose.pair. NoPair."""
        prefill, decode = self._roles_of(self._among(avoided))
        return (
            self._least(prefill.positions, self._prefill_loads),
            self._least(decode.positions, self._decode_loads),
        )

    def pair_by_prefix(self, request: PolicyRequest, avoided: Collection[str]) -> tuple[Item, Item]:
        """As choose.pair_by_prefix. NoPair."""
        prefill, decode = self._roles_of(self._among(avoided))
        return (
            self._least(self._most_cached(request, prefill), self._prefill_loads),
            self._least(self._most_cached(request, decode), self._decode_loads),
        )

    def snapshots(self) -> list[EngineSnapshot]:
        """All of them that their breakers let through, as they are now."""
        return [engine.snapshot() for engine in self._engines if engine.breaker.admits]

    def shortlist(
        self, request: PolicyRequest, count: int, avoided: Collection[str], pool: frozenset[str] = frozenset()
    ) -> list[Item]:
        """Those that any good choice is among: `count` with the fewest sequences for their size, with the fewest prompt
        tokens to compute, and with most of the prompt cached each; all where there are hardly more. Of a `pool`, by
        address, that is to compute prompts for the others, `count` more. NoEngine."""
        among = self._among(avoided)
        positions = among.everyone.positions
        if len(positions) > 3 * count:
            pooled = self._pooled(pool)[positions]
            others = positions if pooled.all() else positions[~pooled]
            lists = [_few(others, count, self._decode_loads), _few(others, count, self._prefill_loads)]
            lists.append(_few(positions[pooled], count, self._prefill_loads))
            holders = self._most_cached(request, among.everyone)
            if len(holders) < len(positions):
                lists.append(_few(holders, count, self._decode_loads))
            positions = np.unique(np.concatenate(lists))
        return [self._engines[position] for position in positions]

    def _pooled(self, pool: frozenset[str]) -> npt.NDArray[np.bool_]:
        """(num_engines,) by place: whether it is one of the pool. They are looked for once, for a pool lasts."""
        if pool is not self._pool:
            self._pool = pool
            self._is_pooled = np.array([engine.address in pool for engine in self._engines], bool)
        return self._is_pooled

    def _least(self, positions: Positions, loads: Loads) -> Item:
        """The engine with the least load, of equal ones the first."""
        best = loads[positions].argmin() if len(positions) > 1 else 0
        return self._engines[int(positions[best])]

    def _among(self, avoided: Collection[str]) -> _Candidates:
        """Those that may be chosen now. NoEngine."""
        if self._moved:
            self._refresh()
        among = self._without(avoided) if self._opened or avoided else self._all
        if not len(among.everyone.positions):
            raise NoEngine("no healthy engine serves this model", retry_delay_s=1.0)
        return among

    def _refresh(self) -> None:
        for engine in self._moved & self._positions.keys():
            position, snapshot = self._positions[engine], engine.snapshot()
            self._prefill_loads[position] = snapshot.prompt_tokens
            self._decode_loads[position] = complex(choose.relative_sequences(snapshot), snapshot.prompt_tokens)
        self._moved.clear()

    def _without(self, avoided: Collection[str]) -> _Candidates:
        """Neither those at these addresses nor those whose breaker is open."""
        self._opened = {engine for engine in self._opened if engine.breaker.state is not BreakerState.CLOSED}
        shut = {self._positions[engine] for engine in self._opened if not engine.breaker.admits}
        if avoided:
            shut |= {position for position, engine in enumerate(self._engines) if engine.address in avoided}
        return self._candidates(shut) if shut else self._all

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
        """Places of the engines of these bits, in order."""
        data = slots.to_bytes((slots.bit_length() + 7) // 8, "little")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        positions = self._position_of_slot[np.flatnonzero(bits)]
        positions.sort()
        return positions


def _few(positions: Positions, count: int, loads: Loads) -> Positions:
    """`count` of these places with the least load."""
    return positions[loads[positions].argsort(kind="stable")[:count]]
