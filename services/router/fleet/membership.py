"""Which addresses belong to the fleet, and who says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from services.router.errors import FleetFull, InvalidRequest, UnknownEngine
from services.router.fleet.member import Member
from services.router.fleet.registry import Registry
from services.rpc.bind import split_address

log = logging.getLogger(__name__)

MAX_ENGINES = 4096
MAX_ADDRESS_CHARACTERS = 256
STATIC, ADMIN = "static", "admin"


def checked_address(address: str) -> str:
    """`address`, if an engine may have it. InvalidRequest."""
    try:
        host, port = split_address(address)
    except ValueError:
        host, port = "", 0
    if not host or not port or len(address) > MAX_ADDRESS_CHARACTERS or not address.isprintable() or " " in address:
        raise InvalidRequest(f"{address[:MAX_ADDRESS_CHARACTERS]!r} is not the host:port of an engine")
    return address


class Membership:
    """An address is in the fleet while at least one source names it, unless an operator has removed it.

    Sources: the command line, an operator, and those that change by themselves (registration, DNS, Kubernetes). Each
    publishes its whole list whenever that changes.
    """

    def __init__(self, registry: Registry, make_member: Callable[[str], Member]) -> None:
        self._registry = registry
        self._make_member = make_member
        self._named: dict[str, tuple[str, ...]] = {}  # by source
        # An operator's word, which sources that forget an engine and name it again do not undo. The latest MAX_ENGINES.
        self._removed: dict[str, None] = {}
        self._drained: dict[str, None] = {}

    def publish(self, source: str, addresses: Collection[str]) -> None:
        """Replaces what a source names. FleetFull, and then nothing has changed."""
        named = self._named | {source: tuple(addresses)}
        self._apply(named, self._removed)
        self._named = named

    def sources(self, address: str) -> tuple[str, ...]:
        """Who names an address."""
        return tuple(sorted(source for source, addresses in self._named.items() if address in addresses))

    def add(self, address: str) -> None:
        """An operator adds an engine, or takes back its removal. FleetFull, and then nothing has changed."""
        named = self._named | {ADMIN: tuple({*self._named.get(ADMIN, ()), address})}
        removed = _without(self._removed, address)
        self._apply(named, removed)
        self._named, self._removed = named, removed

    def remove(self, address: str) -> None:
        """An operator removes an engine: nothing new begins there, what has begun ends. It stays out, whoever names
        it, until it is added again. UnknownEngine."""
        self._member(address)
        self._named[ADMIN] = tuple(each for each in self._named.get(ADMIN, ()) if each != address)
        self._removed = _with(self._removed, address)
        self._drained = _without(self._drained, address)
        self._apply(self._named, self._removed)

    def drain(self, address: str, drained: bool, *, migrate: bool = False) -> None:
        """An operator gives an engine no new work, or gives it work again. With `migrate`, what runs there goes on
        elsewhere, if another engine serves the model. UnknownEngine."""
        member = self._member(address)
        self._drained = _with(self._drained, address) if drained else _without(self._drained, address)
        member.drain(drained)
        if drained and migrate and member.info is not None and self._registry.engines(member.info.model):
            member.take_sequences_away()

    def _member(self, address: str) -> Member:
        member = self._registry.members.get(address)
        if member is None:
            raise UnknownEngine(f"no engine of the fleet has the address {address[:200]!r}")
        return member

    def _apply(self, named: dict[str, tuple[str, ...]], removed: Collection[str]) -> None:
        # A dict, because engines stay in the order in which they were named.
        wanted = {address: None for addresses in named.values() for address in addresses if address not in removed}
        if len(wanted) > MAX_ENGINES:
            raise FleetFull(f"a fleet has at most {MAX_ENGINES} engines, not {len(wanted)}")
        present = self._registry.members
        for address in [each for each in present if each not in wanted]:
            log.info("engine removed", extra={"fields": {"address": address}})
            self._registry.remove(address)
        for address in [each for each in wanted if each not in present]:
            log.info("engine added", extra={"fields": {"address": address}})
            member = self._make_member(address)
            member.drained = address in self._drained
            self._registry.add(member)


def _without(addresses: Iterable[str], address: str) -> dict[str, None]:
    return {each: None for each in addresses if each != address}


def _with(addresses: Iterable[str], address: str) -> dict[str, None]:
    """As the latest of MAX_ENGINES: so many can be meant, and more would grow without bound."""
    return dict.fromkeys([*_without(addresses, address), address][-MAX_ENGINES:])
