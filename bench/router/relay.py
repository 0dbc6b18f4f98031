"""python -m bench.router.relay: the least that a router over one Session could do, to see what the grpc library itself
costs here. Requests become starts and outputs become messages of one token, with no policy, check, text or account.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import deque
from typing import Any

from microserve.engine.v1 import engine_pb2, engine_pb2_grpc
from microserve.router.v1 import router_pb2, router_pb2_grpc

from services.rpc.channel import make_channel
from services.rpc.heap import settle_heap
from services.rpc.server import Server, ServerConfig

SERVICE = "microserve.router.v1.RouterService"


class Relay(router_pb2_grpc.RouterServiceServicer):
    """Generate, and nothing else."""

    def __init__(self, engine: str) -> None:
        self._call = engine_pb2_grpc.EngineServiceStub(make_channel(engine)).Session()
        self._numbers = itertools.count()
        self._outputs: dict[str, asyncio.Queue[engine_pb2.StartGenerateResponse]] = {}
        self._starts: deque[engine_pb2.SessionRequest] = deque()
        self._wake = asyncio.Event()
        self.tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    async def Generate(self, request: router_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        name = str(next(self._numbers))
        outputs = self._outputs[name] = asyncio.Queue()
        start = engine_pb2.StartGenerateRequest(
            request_id=name, prompt_token_ids=request.tokens.ids, sampling=request.sampling
        )
        self._starts.append(engine_pb2.SessionRequest(start=start))
        self._wake.set()
        finished = False
        while not finished:
            output = await outputs.get()
            finished = bool(output.finish_reason)
            await context.write(
                router_pb2.GenerateResponse(token_ids=output.token_ids, finish_reason=output.finish_reason)
            )
        del self._outputs[name]

    async def _read(self) -> None:
        async for frame in self._call:
            for each in frame.outputs:
                self._outputs[each.request_id].put_nowait(each.output)

    async def _write(self) -> None:
        while True:
            while self._starts:
                await self._call.write(self._starts.popleft())
            self._wake.clear()
            await self._wake.wait()


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
