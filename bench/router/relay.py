"""python -m bench.router.relay: the least that a router over one Session could do, to see what the grpc library itself
costs here. Requests become starts and outputs become messages of one token, with no policy, check, text or account.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeAlias

from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.router.v1 import router_pb2, router_pb2_grpc

from services.rpc.channel import make_channel
from services.rpc.heap import settle_heap
from services.rpc.server import Server, ServerConfig

Put: TypeAlias = Callable[[engine_pb2.StartGenerateResponse], None]
SERVICE = "microserve.router.v1.RouterService"


class Relay(router_pb2_grpc.RouterServiceServicer):
    """Generate and Session, and nothing else."""

    def __init__(self, engine: str) -> None:
        self._call = engine_pb2_grpc.EngineServiceStub(make_channel(engine)).Session()
        self._numbers = itertools.count()
        self._puts: dict[str, Put] = {}  # by request id
        self._starts: deque[engine_pb2.SessionRequest] = deque()
        self._wake = asyncio.Event()
        self.tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    async def Generate(self, request: router_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        outputs = asyncio.Queue[engine_pb2.StartGenerateResponse]()
        self._start(request, outputs.put_nowait)
        finished = False
        while not finished:
            output = await outputs.get()
            finished = bool(output.finish_reason)
            await context.write(_response(output))

    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[router_pb2.SessionRequest], context: Any
    ) -> None:
        waiting, ready = list[router_pb2.SessionOutput](), asyncio.Event()

        def put(call_id: int, output: engine_pb2.StartGenerateResponse) -> None:
            last = bool(output.finish_reason)
            waiting.append(router_pb2.SessionOutput(call_id=call_id, response=_response(output), last=last))
            ready.set()

        async def read() -> None:
            async for command in request_iterator:
                self._start(command.generate.request, partial(put, command.generate.call_id))

        reader = asyncio.create_task(read())
        try:
            while True:
                await ready.wait()
                ready.clear()
                frame = router_pb2.SessionResponse(outputs=waiting)
                waiting.clear()
                await context.write(frame)
        finally:
            reader.cancel()

    def _start(self, request: router_pb2.GenerateRequest, put: Put) -> None:
        name = str(next(self._numbers))
        self._puts[name] = put
        start = engine_pb2.StartGenerateRequest(
            request_id=name, prompt_token_ids=request.tokens.ids, sampling=request.sampling
        )
        self._starts.append(engine_pb2.SessionRequest(start=start))
        self._wake.set()

    async def _read(self) -> None:
        async for frame in self._call:
            for each in frame.outputs:
                self._puts[each.request_id](each.output)
                if each.output.finish_reason:
                    del self._puts[each.request_id]

    async def _write(self) -> None:
        while True:
            while self._starts:
                await self._call.write(self._starts.popleft())
            self._wake.clear()
            await self._wake.wait()


def _response(output: engine_pb2.StartGenerateResponse) -> router_pb2.GenerateResponse:
    return router_pb2.GenerateResponse(token_ids=output.token_ids, finish_reason=output.finish_reason)


async def serve(options: argparse.Namespace) -> None:
    """Until the launcher ends it."""
    server = Server(
        ServerConfig(listen="127.0.0.1:0", metrics_port=None, lifeline_fd=options.lifeline_fd, grace_s=0), "router"
    )
    # What it lacks is answered UNIMPLEMENTED.
    relay = Relay(options.engine)  # type: ignore[abstract]
    router_pb2_grpc.add_RouterServiceServicer_to_server(relay, server.grpc)
    await server.start()
    await server.set_serving(SERVICE, True)
    settle_heap()
    server.announce()
    await server.run()
    for task in relay.tasks:
        task.cancel()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--lifeline-fd", type=int, default=None)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
