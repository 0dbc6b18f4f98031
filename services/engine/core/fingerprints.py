"""Digests of a verb's arguments, to tell a retry from a request id used twice.

Bounds on time are left out: a retry has less of it. So is what only the caller sees.
"""

from __future__ import annotations

from hashlib import blake2b

from services.engine.core.api import PrepRecv, RemoteSend, StartGenerate
from services.protocol.hashes import prompt_digest


def fingerprint(command: PrepRecv | RemoteSend | StartGenerate) -> bytes:
    """Sixteen bytes that are equal for a command and its retry."""
    match command:
        case PrepRecv():
            arguments: tuple[object, ...] = ("PrepRecv", command.end)
        case RemoteSend():
            address = command.address
            place = (address.endpoint, address.epoch, address.reservation_id, address.window, address.secret)
            arguments = ("RemoteSend", command.range, command.attempt, place, command.prompt_token_count)
        case StartGenerate():
            ref = command.reservation
            arguments = (
                "StartGenerate",
                command.begin,
                command.prompt_token_count,
                command.prompt_logprobs_begin,
                command.sampling,
                command.forced,
                (ref.reservation_id, ref.secret) if ref else None,
            )
    digest = prompt_digest(command.prompt, command.cache_salt)
    return blake2b(repr(arguments).encode() + digest, digest_size=16).digest()
