"""A router over fake engines, in one process and over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
import pytest
from microserve.router.v1 import admin_pb2_grpc, router_pb2, router_pb2_grpc
from microserve.types.v1 import sampling_pb2

from services.cli.access import showing
from services.router.app import Router
from services.router.config import RouterConfig
from services.router.fleet.backoff import BackoffConfig
from services.router.fleet.cached_blocks import KvEvent
from services.rpc.channel import make_channel
from services.rpc.status import RemoteError, from_rpc_error
from tests.fakes import PATIENCE_S, FakeEngine, FakeModel
from tests.router.vocabularies import byte_level, files

FAST = BackoffConfig(first_s=0.01, longest_s=0.05)
QUEUE_S = 60.0  # requests wait for their turn however slow the machine is
UPLOAD_KEY = "of-the-port-that-takes-programs"
PROMPT = tuple(range(10, 61))  # 51 tokens: not whole pages


@cache
def model(**fields: Any) -> FakeModel:
    return FakeModel(files(byte_level()), **fields)


def script(text: str) -> FakeModel:
    """A model that says this text, token by token, and ends."""
    return model(script=tuple(byte_level().encode(text).ids))


@dataclass
class Running:
    """What a test works with."""

    router: Router
    engines: list[FakeEngine]
    stub: router_pb2_grpc.RouterServiceAsyncStub
    admin: admin_pb2_grpc.AdminServiceAsyncStub
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def first(self) -> FakeEngine:
        return self.engines[0]

    @property
    def http(self) -> str:
        """host:port, if the test gave http_listen."""
        assert self.router.addresses.http is not None
        return self.router.addresses.http

    async def generate(self, prompt: Sequence[int] = PROMPT, **options: Any) -> router_pb2.GenerateResponse:
        """The whole answer. RemoteError."""
        return await complete(self.stub, request(prompt, **options), options.get("policy", ""))

    def stream(self, prompt: Sequence[int] = PROMPT, **options: Any) -> Any:
        """A call of Generate."""
        return self.stub.Generate(request(prompt, **options), metadata=policy_metadata(options.get("policy", "")))

    async def idle(self) -> None:
        """Nothing is held on any engine."""
        for engine in self.engines:
            await engine.idle()

    async def cached(self, engine: FakeEngine, num_blocks: int) -> None:
        """Waits until the router knows of so many cached blocks on the engine."""
        blocks, changed = self.router.registry.members[engine.address].blocks, asyncio.Event()
        apply = blocks.apply

        def apply_and_tell(event: KvEvent) -> bool:
            changed.set()
            return apply(event)

        blocks.apply = apply_and_tell  # type: ignore[method-assign]
        async with asyncio.timeout(PATIENCE_S):
            while len(blocks) < num_blocks:
                await changed.wait()
                changed.clear()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a change of the fleet that makes it true."""
        changed = asyncio.Event()
        self.router.registry.on_change(changed.set)
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                changed.clear()
                await changed.wait()


@asynccontextmanager
async def running(
    num_engines: int = 2,
    *,
    engines: Sequence[FakeEngine] | None = None,
    fake_model: FakeModel | None = None,
    policy: str = "data_parallel",
    takes_uploads: bool = False,
    **options: Any,
) -> AsyncIterator[Running]:
    """Starts all, waits until every engine has joined, checks at the end that nothing is held.

    `takes_uploads`: at an address of its own, whose key `admin` shows.
    """
    if engines is None:
        peers: dict[str, FakeEngine] = {}
        engines = [FakeEngine(fake_model or model(), "abcdef"[i], peers=peers) for i in range(num_engines)]
    async with AsyncExitStack() as stack:
        for engine in engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
        if takes_uploads:
            key_file = Path(stack.enter_context(TemporaryDirectory())) / "upload.key"
            key_file.write_text(f"{UPLOAD_KEY}\n")
            options |= {"admin_listen": "127.0.0.1:0", "allow_policy_upload": True, "upload_key_file": key_file}
        config = RouterConfig(
            listen="127.0.0.1:0",
            engine=tuple(engine.address for engine in engines),
            policy=policy,
            **({"queue_timeout": QUEUE_S} | options),
        )
        router = Router(config, backoff=FAST)
        stack.push_async_callback(router.close)
        addresses = await router.start()
        shown = showing("", UPLOAD_KEY) if takes_uploads else ()
        channels = [make_channel(addresses.grpc), make_channel(addresses.admin or addresses.grpc, interceptors=shown)]
        for channel in channels:
            stack.push_async_callback(channel.close)
        stub, admin = router_pb2_grpc.RouterServiceStub(channels[0]), admin_pb2_grpc.AdminServiceStub(channels[1])
        suite = Running(router, list(engines), stub, admin, channels)
        await suite.until(lambda: all(member.healthy for member in router.registry.members.values()))
        yield suite
        await suite.idle()


def request(prompt: Sequence[int] = PROMPT, **options: Any) -> router_pb2.GenerateRequest:
    """`text`, `chat` or token ids; max_tokens 8 unless told; options of both messages by name."""
    sampling_names = sampling_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    sampling = {name: value for name, value in options.items() if name in sampling_names}
    message = router_pb2.GenerateRequest(
        sampling=sampling_pb2.SamplingParams(**({"max_tokens": 8} | sampling)), seed_given=options.get("seed") == 0
    )
    for name in ("stop", "include_stop", "model", "cache_salt", "request_id", "n", "echo", "prompt_only"):
        if name in options:
            message.MergeFrom(router_pb2.GenerateRequest(**{name: options[name]}))
    if "text" in options:
        message.text = options["text"]
    elif "chat" in options:
        message.chat.SetInParent()
        for role, content in options["chat"]:
            message.chat.messages.add(role=role, content=content)
    else:
        message.tokens.ids.extend(prompt)
    return message


async def first_tokens(call: Any, number: int) -> list[int]:
    """Reads a call of Generate until so many tokens have come."""
    tokens: list[int] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(tokens) < number:
            tokens.extend((await call.read()).token_ids)
    return tokens


async def other_tokens(call: Any) -> tuple[list[int], Any]:
    """The tokens that are still to come, and the last message."""
    tokens: list[int] = []
    last = None
    while (piece := await call.read()) is not grpc.aio.EOF:
        tokens.extend(piece.token_ids)
        last = piece
    return tokens, last


async def at_once(suite: Running, number: int, engines: Sequence[FakeEngine]) -> set[str]:
    """Names of the engines of so many answers, none of which is over before all of these engines have begun one."""
    for engine in engines:
        engine.gate.clear()
    asked = [asyncio.create_task(suite.generate()) for _ in range(number)]
    for engine in engines:
        await engine.until(lambda engine=engine: engine.sequences)  # type: ignore[misc]
    for engine in engines:
        engine.gate.set()
    return {(await answer).legs[0].engine for answer in asked}


def policy_metadata(policy: str) -> tuple[tuple[str, str], ...]:
    return (("x-microserve-policy", policy),) if policy else ()


async def complete(stub: Any, message: router_pb2.GenerateRequest, policy: str = "") -> router_pb2.GenerateResponse:
    """Complete, with errors as RemoteError."""
    try:
        call = stub.Complete(router_pb2.CompleteRequest(request=message), metadata=policy_metadata(policy), timeout=60)
        return (await call).response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


@contextmanager
def failing(code: str, reason: str) -> Any:
    """The block must raise a RemoteError of that code and reason, with a sentence."""
    with pytest.raises(RemoteError) as caught:
        yield caught
    assert (caught.value.code.name, caught.value.reason) == (code, reason), caught.value.message
    assert len(caught.value.message) > 10


def verbs(response: router_pb2.GenerateResponse) -> list[tuple[str, str, int, int]]:
    """(verb, engine, begin, end) of every leg."""
    name = sampling_pb2.Verb.Name
    return [
        (name(leg.verb).removeprefix("VERB_").lower(), leg.engine, leg.range.begin, leg.range.end)
        for leg in response.legs
    ]
