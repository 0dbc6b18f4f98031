"""As kvtransfer. The model named "missing" cannot be loaded, the one named "bug" raises, the one named
"interrupt" has its launcher interrupted meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from services.rpc.config import parse_config
from services.rpc.errors import StartError
from services.rpc.main import run_main
from services.rpc.server import Server
from tests.cli.fakes.config import EngineConfig


async def serve(config: EngineConfig) -> None:
    if config.model == "missing":
        raise StartError("there is no model missing")
    if config.model == "bug":
        raise RuntimeError("a bug while loading")
    if config.model == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        await asyncio.Event().wait()
    print("words on stdout are not READY lines", os.environ["OMP_NUM_THREADS"])
    print(f"threads={config.threads} OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", file=sys.stderr)
    server = Server(config, "engine")
    await server.start()
    await server.set_serving("", True)
    server.announce()
    await server.run()


if __name__ == "__main__":
    run_main("fake-engine", serve(parse_config(EngineConfig, sys.argv[1:], "fake-engine")))
