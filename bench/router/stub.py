"""python -m bench.router.stub: an engine that computes nothing, as a process of its own.

A sequence gets `--tokens` tokens as soon as it is one of `--batch`, and as many after each step of `--step-ms`; the
others wait in order. What a reader has not taken when the next step ends is merged, as an engine merges it.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from microserve.engine.v1 import engine_pb2 as pb
from microserve.engine.v1.engine_pb2_grpc import EngineServiceServicer, add_EngineServiceServicer_to_server
from microserve.types.v1 import kv_pb2, sampling_pb2

from services.rpc.heap import settle_heap
from services.rpc.server import Server, ServerConfig
from tests.router.vocabularies import byte_level, files

SERVICE = "microserve.engine.v1.EngineService"
MODEL, TOKEN, MAX_CONTEXT = "stub", 70, 1 << 20
LOAD_PERIOD_S = 0.1


class Sink:
    """What sequences produced and their one reader has not taken yet."""

    def __init__(self) -> None:
        self._outputs: dict[str, pb.StartGenerateResponse] = {}
        self._wake = asyncio.Event()

    def put(self, request_id: str, output: pb.StartGenerateResponse) -> None:
        before = self._outputs.get(request_id)
        if before is None:
            self._outputs[request_id] = output
        else:
            before.MergeFrom(output)
        self._wake.set()

    async def take(self) -> dict[str, pb.StartGenerateResponse]:
        await self._wake.wait()
        self._wake.clear()
        taken, self._outputs = self._outputs, {}
        return taken


class Sequence:
    """One generation: how much it still has to give, and to whom."""

    def __init__(self, start: pb.StartGenerateRequest, sink: Sink) -> None:
        self.request_id, self.sink = start.request_id, sink
        self.left = self.wanted = start.sampling.max_tokens or 16
        self.prompt_tokens = len(start.prompt_token_ids)

    def step(self, tokens: int) -> bool:
        """Gives some; whether that was all."""
        given = min(tokens, self.left)
        self.left -= given
        output = pb.StartGenerateResponse(token_ids=[TOKEN] * given)
        if not self.left:
            output.finish_reason = sampling_pb2.FINISH_REASON_LENGTH
            output.timing.computed_token_count = self.prompt_tokens
            output.timing.generated_token_count = self.wanted
        self.sink.put(self.request_id, output)
        return not self.left

    def cancel(self) -> None:
        self.sink.put(self.request_id, pb.StartGenerateResponse(finish_reason=sampling_pb2.FINISH_REASON_CANCELLED))


class Stub(EngineServiceServicer):
    """The part of the contract that data_parallel needs."""

    def __init__(self, name: str, step_s: float, batch: int, tokens: int) -> None:
        self._name, self._step_s, self._batch, self._tokens = name, step_s, batch, tokens
        self._incarnation = secrets.token_bytes(16)
        self._files = files(byte_level())
        self._running: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Steps, one after the other on a clock that does not drift."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while True:
            if not self._running:
                self._wake.clear()
                await self._wake.wait()
                begin = loop.time()
            begin = max(begin + self._step_s, loop.time() - self._step_s)
            await asyncio.sleep(max(0.0, begin - loop.time()))
            for sequence in tuple(self._running.values()):
                if sequence.step(self._tokens):
                    del self._running[sequence.request_id]
            self._admit()

    def _admit(self) -> None:
        """Prompts take no time."""
        while self._waiting and len(self._running) < self._batch:
            sequence = self._waiting.popleft()
            if not sequence.step(self._tokens):
                self._running[sequence.request_id] = sequence
                self._wake.set()

    def _begin(self, start: pb.StartGenerateRequest, sink: Sink) -> Sequence:
        sequence = Sequence(start, sink)
        self._waiting.append(sequence)
        self._admit()
        return sequence

    def _end(self, sequence: Sequence) -> bool:
        """Whether it had not ended by itself."""
        is_running = self._running.pop(sequence.request_id, None) is not None
        if not is_running and sequence not in self._waiting:
            return False
        if not is_running:
            self._waiting.remove(sequence)
        self._admit()
        return True

    async def Session(self, requests: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        sink, sequences = Sink(), dict[str, Sequence]()

        async def read() -> None:
            async for command in requests:
                if command.HasField("start"):
                    sequences[command.start.request_id] = self._begin(command.start, sink)
                else:
                    sequence = sequences.pop(command.cancel.request_id, None)
                    if sequence is not None and self._end(sequence):
                        sequence.cancel()

        reader = asyncio.create_task(read())
        try:
            while True:
                frame = pb.SessionResponse()
                for request_id, output in (await sink.take()).items():
                    frame.outputs.add(request_id=request_id, output=output)
                    if output.finish_reason:
                        sequences.pop(request_id, None)
                yield frame
        finally:
            reader.cancel()
            for sequence in sequences.values():
                self._end(sequence)

    async def StartGenerate(
        self, request: pb.StartGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StartGenerateResponse]:
        sink = Sink()
        sequence = self._begin(request, sink)
        try:
            while True:
                for output in (await sink.take()).values():
                    yield output
                    if output.finish_reason:
                        return
        finally:
            self._end(sequence)

    async def GetInfo(self, request: pb.GetInfoRequest, context: Any) -> pb.GetInfoResponse:
        return pb.GetInfoResponse(
            engine_name=self._name,
            incarnation=self._incarnation,
            contract_version="1.0",
            model=MODEL,
            model_digest=b"stub" * 4,
            tokenizer_digest=b"vocabulary" * 2,
            layout=kv_pb2.PageLayout(page_size=16),
            max_context_length=MAX_CONTEXT,
            vocab_size=341,
            max_batch_size=self._batch,
        )

    async def WatchLoad(self, request: pb.WatchLoadRequest, context: Any) -> AsyncIterator[pb.WatchLoadResponse]:
        while True:
            yield pb.WatchLoadResponse(
                running_sequence_count=len(self._running),
                waiting_sequence_count=len(self._waiting),
                queued_token_count=sum(each.prompt_tokens for each in self._waiting),
            )
            await asyncio.sleep(LOAD_PERIOD_S)

    async def WatchKvEvents(self, request: Any, context: Any) -> AsyncIterator[pb.WatchKvEventsResponse]:
        yield pb.WatchKvEventsResponse(snapshot=True, snapshot_complete=True)
        await asyncio.Event().wait()

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[pb.GetTokenizerResponse]:
        for name, data in self._files.items():
            yield pb.GetTokenizerResponse(file_name=name, data=data)


async def serve(options: argparse.Namespace) -> None:
    """Until the launcher ends it."""
    server = Server(
        ServerConfig(listen=options.listen, metrics_port=None, lifeline_fd=options.lifeline_fd, grace_s=0), "engine"
    )
    # What it lacks is answered UNIMPLEMENTED.
    stub = Stub(  # type: ignore[abstract]
        options.name, options.step_ms / 1e3, options.batch, options.tokens
    )
    add_EngineServiceServicer_to_server(stub, server.grpc)
    await server.start()
    await server.set_serving(SERVICE, True)
    steps = asyncio.create_task(stub.run())
    settle_heap()
    server.announce()
    await server.run()
    steps.cancel()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="stub")
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--lifeline-fd", type=int, default=None)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
