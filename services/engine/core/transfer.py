"""This engine's link to the KV transfer service: whether there is one, which incarnation, and its ready counters."""

from __future__ import annotations

from itertools import count

from services.engine.core.api import TransferServiceReady
from services.engine.core.ports import KvPort
from services.engine.errors import NoKvTransfer, TransferServiceGone


class TransferLink:
    """Knows the present incarnation of the service and owns its ready slots. `port` is None without a service."""

    def __init__(self, port: KvPort | None) -> None:
        self._port = port
        self._service: TransferServiceReady | None = None
        self._free_slots: list[int] = []
        self._push_ids = count(1)

    @property
    def port(self) -> KvPort:
        """Where requests to the service go. Raises NoKvTransfer."""
        if self._port is None:
            raise NoKvTransfer("This engine runs without a KV transfer service.")
        return self._port

    def service(self) -> TransferServiceReady:
        """The present incarnation. Raises NoKvTransfer, or TransferServiceGone while there is none."""
        if self._port is not None and self._service is None:
            raise TransferServiceGone("The KV transfer service of this engine is not there.", retry_delay_s=1.0)
        if self._service is None:
            raise NoKvTransfer("This engine runs without a KV transfer service.")
        return self._service

    def ready(self, service: TransferServiceReady) -> None:
        """An incarnation has the pool."""
        self._service = service
        self._free_slots = list(range(service.ready_slots))

    def lost(self) -> None:
        """The incarnation is gone, and its slots with it."""
        self._service = None
        self._free_slots = []

    @property
    def is_lost(self) -> bool:
        """Whether there is no incarnation to talk to."""
        return self._service is None

    def next_push_id(self) -> int:
        """A name for a push that none had before."""
        return next(self._push_ids)

    def take_slot(self) -> int | None:
        """A ready counter set to zero, or None if all are in use."""
        if not self._free_slots:
            return None
        slot = self._free_slots.pop()
        self.port.raise_ready(slot, 0)
        return slot

    def return_slot(self, slot: int) -> None:
        """The push that read the counter has ended. Only for slots of the present incarnation."""
        self._free_slots.append(slot)
