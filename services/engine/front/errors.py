"""What the gRPC side adds to services/engine/errors.py.

EngineError
`-- CacheWatchBehind       the reader of cache events fell behind
"""

from __future__ import annotations

from services.engine.errors import EngineError
from services.protocol.errors import Code


class CacheWatchBehind(EngineError):
    """The reader of cache events fell behind; a new call starts from a snapshot."""

    code = Code.ABORTED
    reason = "RESYNC"
