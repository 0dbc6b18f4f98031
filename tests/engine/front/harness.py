"""EngineService in this process over a real channel, with a scripted stand-in for the loop thread behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import EngineServiceStub, add_EngineServiceServicer_to_server

from services.engine.core.api import Command, Load, SequenceOutput, StartGenerate
from services.engine.front.front import Front
from services.engine.front.limits import Limits
from services.engine.servicer import EngineIdentity, EngineServicer, TransferView
from services.protocol.layout import Dtype, PageLayout
from services.protocol.pages import PageCounts
from services.rpc.channel import make_channel
from services.rpc.server import Server, ServerConfig

C = TypeVar("C", bound=Command)

LAYOUT = PageLayout(layer_count=2, kv_head_count=1, head_dim=4, page_size=4, dtype=Dtype.FLOAT32)
LIMITS = Limits(vocab_size=100, context_limit=64)
OWNER = "tester"
TOKENIZER_FILES = (("tokenizer.json", b"x" * (2 << 20)), ("special_tokens.json", b"{}"))


class FakeEngine:
    """Keeps the commands it is given, in order; the test answers them."""

    def __init__(self) -> None:
        self.front = Front(self.submit, self._on_stopped)
        self.stopped = asyncio.Event()
        self._commands: list[Command] = []
        self._arrived = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()

    def submit(self, command: Command) -> None:
        self._commands.append(command)
        notice = asyncio.create_task(self._notify())
        self._notices.add(notice)
        notice.add_done_callback(self._notices.discard)

    async def next(self, kind: type[C]) -> C:
        """The oldest command of a kind that no test has taken, waited for."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: any(isinstance(c, kind) for c in self._commands))
        command = next(c for c in self._commands if isinstance(c, kind))
        self._commands.remove(command)
        return command

    def untaken(self, kind: type[Command]) -> int:
        """How many such commands no test has taken."""
        return sum(isinstance(command, kind) for command in self._commands)

    def step(self, *outputs: SequenceOutput) -> None:
        """What the loop thread does after a step."""
        self.front.on_outputs(outputs)

    async def _notify(self) -> None:
        async with self._arrived:
            self._arrived.notify_all()

    def _on_stopped(self) -> None:
        self.stopped.set()


@dataclass
class Served:
    """A served fake engine and a stub to it."""

    engine: FakeEngine
    stub: EngineServiceStub


@asynccontextmanager
async def serve(*, with_kvtransfer: bool = True) -> AsyncIterator[Served]:
    """Serves on a free port for the length of the block."""
    engine = FakeEngine()
    identity = EngineIdentity(
        name="engine-0",
        incarnation=b"i" * 16,
        model="tiny",
        model_digest=b"m" * 16,
        tokenizer_digest=b"t" * 16,
        layout=LAYOUT,
        page_count=32,
        limits=LIMITS,
        device="cpu",
        labels={"zone": "a"},
        eos_token_ids=(2,),
        max_batch_size=8,
        max_message_bytes=4096,
    )
    view = TransferView("127.0.0.1:1", ("shm",))
    servicer = EngineServicer(
        engine.front, identity, TOKENIZER_FILES, (lambda: view) if with_kvtransfer else None, clock=lambda: 1000.0
    )
    server = Server(ServerConfig(metrics_port=None), "engine")
    add_EngineServiceServicer_to_server(servicer, server.grpc)
    channel = make_channel(await server.start())
    try:
        yield Served(engine, EngineServiceStub(channel))
    finally:
        await channel.close()
        await server.stop(0)


def start_request(
    request_id: str = "r1", prompt: tuple[int, ...] = (5, 6, 7), **fields: object
) -> pb.StartGenerateRequest:
    """A valid start, changed by `fields`."""
    return pb.StartGenerateRequest(
        **{"owner_id": OWNER, "request_id": request_id, "prompt_token_ids": prompt, **fields}  # type: ignore[arg-type]
    )


def output(command: StartGenerate, *token_ids: int, **fields: object) -> SequenceOutput:
    """New output of the sequence that `command` began."""
    made = SequenceOutput(command.key, token_ids, call_id=command.call_id)
    return replace(made, **fields)  # type: ignore[arg-type]


def load(steps: int, running: int = 0) -> Load:
    """Some load."""
    return Load(running, 0, 0, 0, 0, 0, PageCounts(32, 0, 0, 0, 32), steps, False)
