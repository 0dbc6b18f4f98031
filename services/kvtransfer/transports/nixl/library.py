"""NIXL's Python binding, loaded where it is installed and brought to the few calls that reading needs.

NIXL (github.com/ai-dynamo/nixl) moves bytes over UCX: RDMA where the machine has it, shared memory and TCP elsewhere.
Only reads are used; transports/nixl/sink.py says why.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any, Protocol

# What the wheels nixl-cu13 and nixl-cu12 install. The package nixl would pull in both, and a torch of its own choice.
_MODULES = ("nixl_cu13._api", "nixl_cu12._api")


class NixlMissing(Exception):
    """NIXL is not installed or does not work here; the message is a clause for people."""


class NixlFailed(Exception):
    """NIXL refused a call; what was posted before is unaffected."""


class ReadState(Enum):
    """How far a posted read is. FAILED does not say that nothing of it is written any more."""

    MOVING = "MOVING"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes in some process: address and length."""

    address: int
    num_bytes: int


class Read(Protocol):
    """A posted read."""

    def state(self) -> ReadState:
        """How far it is; makes it go on, too."""

    def release(self) -> None:
        """Frees what the library keeps for it. Only when it is MOVING no more."""


class Agent(Protocol):
    """One end of reads. Used by one thread only."""

    def register(self, span: Span) -> None:
        """Lets peers read these bytes, or reads land in them. They must stay mapped for the agent's life."""

    def metadata(self) -> bytes:
        """What a peer must know to read from this agent. Whoever has it can read and write what is registered."""

    def add_peer(self, metadata: bytes) -> str:
        """Makes a peer known; returns its name. Raises NixlFailed."""

    def remove_peer(self, name: str) -> None:
        """Forgets a peer. No read from it may be MOVING: removal does not stop one."""

    def read(self, peer: str, local: Sequence[Span], remote: Sequence[Span]) -> Read:
        """Posts a read of as many remote spans as local ones, each pair of one length. Raises NixlFailed."""

    def progress(self) -> None:
        """Lets what peers ask of this agent go on."""

    def close(self) -> None:
        """Lets go of what is registered. The agent is used no more."""


def load(devices: str) -> ModuleType:
    """The binding, held to the network devices named (a value of UCX_NET_DEVICES). Raises NixlMissing."""
    # UCX reads it when its first context is made. Without it every interface of the machine would listen.
    os.environ["UCX_NET_DEVICES"] = devices
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        # On import it sends its own log to standard output, where a service's READY line is read.
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate, logging.raiseExceptions = True, raise_exceptions
        logger.setLevel(logging.WARNING)
        return module
    raise NixlMissing("neither nixl-cu13 nor nixl-cu12 is installed")


class NixlAgent:
    """Agent by the library."""

    def __init__(self, module: ModuleType, name: str) -> None:
        """Raises NixlMissing if the library cannot work here."""
        # Its progress thread would burn a core when idle; whoever owns the agent polls instead.
        config = module.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        try:
            self._agent: Any = module.nixl_agent(name, config)
        except Exception as error:  # the binding has no common base for its errors
            raise NixlMissing(f"NIXL cannot start: {error}") from None
        if "UCX" not in self._agent.backends:
            raise NixlMissing("this build of NIXL has no UCX")

    def register(self, span: Span) -> None:
        """See Agent."""
        try:
            self._agent.register_memory([(span.address, span.num_bytes, 0, "")], "DRAM")
        except Exception as error:
            raise NixlFailed(str(error)) from None

    def metadata(self) -> bytes:
        """See Agent."""
        try:
            return bytes(self._agent.get_agent_metadata())
        except Exception as error:
            raise NixlFailed(str(error)) from None

    def add_peer(self, metadata: bytes) -> str:
        """See Agent."""
        try:
            name = self._agent.add_remote_agent(metadata)
        except Exception as error:
            raise NixlFailed(str(error)) from None
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove_peer(self, name: str) -> None:
        """See Agent."""
        self._agent.remove_remote_agent(name)

    def read(self, peer: str, local: Sequence[Span], remote: Sequence[Span]) -> Read:
        """See Agent."""
        try:
            here = self._agent.get_xfer_descs([(s.address, s.num_bytes, 0) for s in local], "DRAM")
            there = self._agent.get_xfer_descs([(s.address, s.num_bytes, 0) for s in remote], "DRAM")
            handle = self._agent.initialize_xfer("READ", here, there, peer)
            return _NixlRead(self._agent, handle, self._agent.transfer(handle))
        except Exception as error:
            raise NixlFailed(str(error)) from None

    def progress(self) -> None:
        """See Agent."""
        self._agent.get_new_notifs()

    def close(self) -> None:
        """See Agent. The library deregisters when the last reference goes."""
        self._agent = None


class _NixlRead:
    def __init__(self, agent: Any, handle: Any, state: str) -> None:
        self._agent, self._handle, self._state = agent, handle, _state(state)

    def state(self) -> ReadState:
        if self._state is ReadState.MOVING:
            try:
                self._state = _state(self._agent.check_xfer_state(self._handle))
            except Exception:  # a peer that disconnected is an exception of the binding
                self._state = ReadState.FAILED
        return self._state

    def release(self) -> None:
        self._handle.release()


def _state(word: str) -> ReadState:
    return {"PROC": ReadState.MOVING, "DONE": ReadState.DONE}.get(word, ReadState.FAILED)
