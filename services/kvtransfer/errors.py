"""What the transfer service answers when it cannot do what was asked.

    ServiceError
    └── KvTransferError
        ├── InvalidRequest       a field is malformed or contradicts another
        ├── InvalidPool          no pool can have that name, layout or size
        ├── InvalidPages         page ids out of range, repeated, too few, or not those of the grant
        ├── UnknownPool          no such pool in this incarnation
        ├── PoolInUse            its engine is alive
        ├── NoMemory             larger than the service may allocate
        ├── NoDevice             the service was not started for that GPU
        ├── DeviceFailed         the GPU refused a copy
        ├── NoTransport          no way of moving bytes there
        ├── PeerUnreachable      the receiver's service does not answer
        ├── TransportFailed      a way of moving bytes there does not work at present
        ├── PeerLost             the receiver's service went away in the middle
        ├── ProtocolViolation    a peer says what no service of this version says
        ├── TooManyConnections   the data port has no room for one more
        ├── ChecksumMismatch     bytes arrived other than they were sent
        ├── PushStalled          the ready counter stood still for too long
        ├── PushCancelled        nobody waits for the push any more
        ├── EngineGone           the engine of the pool died or was replaced
        ├── NotDrained           a copy that was fenced has not ended yet
        ├── WatchLagged          the watcher reads too slowly
        └── Draining             the service is about to stop

Rules of reservations, grants and attempts are broken with services.protocol.errors.
"""

from __future__ import annotations

from services.protocol.errors import Code, ServiceError


class KvTransferError(ServiceError):
    """An error of the KV transfer service."""


class InvalidRequest(KvTransferError):
    """A field is malformed or contradicts another."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class InvalidPool(KvTransferError):
    """No pool can have that name, layout or number of pages."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_POOL"


class InvalidPages(KvTransferError):
    """Page ids are out of range, repeated, too few or too many, or not those of the grant."""

    code = Code.INVALID_ARGUMENT
    reason = "INVALID_PAGES"


class UnknownPool(KvTransferError):
    """This incarnation of the service has no such pool, or has it no longer."""

    code = Code.NOT_FOUND
    reason = "UNKNOWN_POOL"


class PoolInUse(KvTransferError):
    """The engine that has the pool is alive."""

    code = Code.FAILED_PRECONDITION
    reason = "POOL_IN_USE"


class NoMemory(KvTransferError):
    """The pool is larger than the service may allocate, or than the machine can give."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "NO_MEMORY"


class NoDevice(KvTransferError):
    """The pool is to be in the memory of a GPU that the service was not started for."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_DEVICE"


class DeviceFailed(KvTransferError):
    """The GPU or its driver refused a copy. A service whose GPU fails as a whole ends."""

    code = Code.UNAVAILABLE
    reason = "DEVICE_FAILED"


class NoTransport(KvTransferError):
    """No transport moves bytes between these two pools."""

    code = Code.FAILED_PRECONDITION
    reason = "NO_TRANSPORT"


class PeerUnreachable(KvTransferError):
    """The receiver's transfer service does not answer at the address it is said to have."""

    code = Code.UNAVAILABLE
    reason = "PEER_UNREACHABLE"


class TransportFailed(KvTransferError):
    """A transport to the receiver could not be set up at present; nothing was written."""

    code = Code.UNAVAILABLE
    reason = "TRANSPORT_FAILED"


class PeerLost(KvTransferError):
    """The connection to the receiver's service ended or fell silent in the middle; nothing of the attempt counts."""

    code = Code.UNAVAILABLE
    reason = "PEER_LOST"


class ProtocolViolation(KvTransferError):
    """What came over a connection is nothing that a service of this version sends; the connection ends."""

    code = Code.INVALID_ARGUMENT
    reason = "PROTOCOL_VIOLATION"


class TooManyConnections(KvTransferError):
    """The data port has as many connections as it takes."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_CONNECTIONS"


class ChecksumMismatch(KvTransferError):
    """Bytes arrived other than they were sent; they do not count."""

    code = Code.DATA_LOSS
    reason = "CHECKSUM_MISMATCH"


class PushStalled(KvTransferError):
    """Neither a layer became ready nor a copy ended for as long as the service waits."""

    code = Code.DEADLINE_EXCEEDED
    reason = "PUSH_STALLED"


class PushCancelled(KvTransferError):
    """The caller left, ended the attempt, or pushed the same part again."""

    code = Code.CANCELLED
    reason = "PUSH_CANCELLED"


class EngineGone(KvTransferError):
    """The engine that asked died, closed its connection or was replaced."""

    code = Code.ABORTED
    reason = "ENGINE_GONE"


class NotDrained(KvTransferError):
    """A copy that was fenced has not ended yet; its pages are not safe. Asking again is right."""

    code = Code.UNAVAILABLE
    reason = "NOT_DRAINED"


class WatchLagged(KvTransferError):
    """More grants changed than the watcher read; watching again begins with a snapshot."""

    code = Code.ABORTED
    reason = "WATCH_LAGGED"


class Draining(KvTransferError):
    """The service is about to stop and begins nothing new."""

    code = Code.UNAVAILABLE
    reason = "DRAINING"
