"""The three verbs as a router calls them: with its client, over a session with each engine."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace

import grpc.aio

from services.cli.kvbench.verbs import OWNER, TIMEOUT_S
from services.router.fleet.client import EngineClient
from services.router.request import PolicyRequest
from services.router.values import Sampling

# A whole number of pages, all but the last token cached at both ends.
PROMPT = tuple(7 + i % 200 for i in range(33))
SALT = "control"
_MAX_BUFFERED = 16
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class RoutedVerbs:
    """A sender, a receiver, and what is asked of them."""

    sender: EngineClient
    receiver: EngineClient
    request: PolicyRequest

    @classmethod
    async def on(cls, to_sender: grpc.aio.Channel, to_receiver: grpc.aio.Channel) -> RoutedVerbs:
        """Clients that know their engines, as those of a router's fleet do. close() closes the channels, too."""
        sender, receiver = _client(to_sender), _client(to_receiver)
        await sender.get_info()
        model = (await receiver.get_info()).model
        request = PolicyRequest("", model, PROMPT, Sampling(max_tokens=1, ignore_eos=True), SALT)
        return cls(sender, receiver, request)

    async def sequence(self) -> None:
        """prep_recv, remote_send of an empty range, start_generate of one token."""
        request = replace(self.request, deadline=asyncio.get_running_loop().time() + TIMEOUT_S)
        end = len(PROMPT) - 1
        kv = await self.receiver.prep_recv(self._id(), request, end, 0.0)
        await self.sender.remote_send(self._id(), request, kv.window, kv, 1)
        generated = self.receiver.start_generate(self._id(), request, end, kv)
        while await generated.take() is not None:
            pass

    async def close(self) -> None:
        """Ends the sessions."""
        await self.sender.close()
        await self.receiver.close()

    def _id(self) -> str:
        return str(next(_numbers))


def _client(channel: grpc.aio.Channel) -> EngineClient:
    return EngineClient("an engine", channel, f"{OWNER}-router", max_buffered=_MAX_BUFFERED)
