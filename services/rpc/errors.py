"""Why a service could not start. These never cross the wire; they end as one line and exit code 2.

StartError
`-- PortInUse
"""

from __future__ import annotations

import errno


class StartError(Exception):
    """The service cannot start; the message is one sentence for whoever started it."""


class PortInUse(StartError):
    """Somebody else listens there."""


def port_in_use(address: str, error: Exception) -> StartError:
    """The StartError for a failed bind of host:port."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return PortInUse(f"{address} is in use by another process")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return StartError(f"cannot listen on {address}: {reason}")
