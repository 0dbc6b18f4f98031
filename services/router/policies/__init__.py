"""Serving patterns, each one async generator in a file of its own; docs/policies.md teaches how to write one."""

from services.protocol.errors import ServiceError
from services.protocol.ranges import TokenRange
from services.router.errors import NoPair, Refused
from services.router.fleet.generation import Generation
from services.router.fleet.reservation import Reservation
from services.router.fleet.view import Engine, Fleet
from services.router.request import PolicyRequest
from services.router.values import Chunk, FinishReason

__all__ = [
    "Chunk",
    "Engine",
    "FinishReason",
    "Fleet",
    "Generation",
    "NoPair",
    "PolicyRequest",
    "Refused",
    "Reservation",
    "ServiceError",
    "TokenRange",
]
