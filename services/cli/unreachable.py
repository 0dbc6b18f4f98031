"""Why a router could not be reached, from what gRPC says of it."""

from __future__ import annotations

from services.cli.access import CA_VARIABLE, CERTIFICATE_VARIABLE
from services.cli.errors import CliError

# What gRPC's words for it have in them, and what it means here.
_CAUSES = (
    ("Connection refused", "nobody listens there; start one with: microserve up"),
    ("lookup", "there is no such host"),
    ("WRONG_VERSION_NUMBER", f"it speaks no TLS, but {CA_VARIABLE} is set"),
    ("CERTIFICATE_VERIFY_FAILED", f"its certificate is not of the authority that {CA_VARIABLE} names"),
    ("Hostname Verification", "its certificate is for another host"),
    (
        "Expected SETTINGS frame",
        "what listens there does not speak gRPC (--address takes the gRPC port, not the HTTP port)",
    ),
    (
        "Socket closed",
        f"it closed the connection: does it want TLS ({CA_VARIABLE}), or a certificate ({CERTIFICATE_VARIABLE})?",
    ),
    ("timed out", "it took too long to connect"),
)
_NEVER_CONNECTED = ("failed to connect", "errors resolving")


def in_short(said: str) -> str:
    """What matters of a sentence of gRPC's about a connection; others as they are."""
    return said.rpartition(": ")[2] if said.startswith(_NEVER_CONNECTED) else said


def unreachable(address: str, said: str) -> CliError:
    """For a call that ended with gRPC's own UNAVAILABLE: nobody of ours said it."""
    if not said.startswith(_NEVER_CONNECTED):
        return CliError(f"the router at {address} broke off: {said}")
    cause = next((cause for words, cause in _CAUSES if words in said), said)
    return CliError(f"no router answers at {address}: {cause}")
