"""Serving patterns, each one async generator in a file of its own; docs/policies.md teaches how to write one."""

from services.router.fleet.view import Engine, Fleet
from services.router.request import PolicyRequest
from services.router.values import Chunk

__all__ = ["Chunk", "Engine", "Fleet", "PolicyRequest"]
