"""Engines that join by themselves, and leave when they are not heard of."""

from __future__ import annotations

import asyncio

from services.router.fleet.membership import Membership

REGISTERED = "register"


class Registrations:
    """Names an address in the fleet until its lease is over. All methods belong to the event loop's thread."""

    def __init__(self, membership: Membership, lease_s: float) -> None:
        self.lease_s = lease_s
        self._membership = membership
        self._leases: dict[str, asyncio.TimerHandle] = {}

    def register(self, address: str) -> None:
        """Adds an engine, or extends its lease. FleetFull."""
        if address in self._leases:
            self._leases[address].cancel()
        else:
            self._membership.publish(REGISTERED, (*self._leases, address))
        self._leases[address] = asyncio.get_running_loop().call_later(self.lease_s, self.deregister, address)

    def deregister(self, address: str) -> None:
        """Takes an engine out; nothing happens if it is not in."""
        lease = self._leases.pop(address, None)
        if lease is not None:
            lease.cancel()
            self._membership.publish(REGISTERED, tuple(self._leases))

    def close(self) -> None:
        """Leaves no timer behind."""
        for lease in self._leases.values():
            lease.cancel()
