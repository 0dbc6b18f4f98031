"""As kvtransfer. The model named "missing" cannot be loaded, the one named "bug" raises, the one named
"interrupt" has its launcher interrupted meanwhile.

A model that is a folder may hold what an engine is to do at its start, each file named for it:
NAME.fails          not to start, this once
NAME.forks          to have a child, which holds its stdout, and to write the child's pid there
NAME.before_ready   to wait until something is written into this pipe, then to be ready
NAME.before_serving to be ready, and to wait until something is written into this pipe, then to serve
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from services.rpc.config import parse_config
from services.rpc.errors import StartError
from services.rpc.main import run_main
from services.rpc.server import Server
from tests.cli.fakes.config import EngineConfig


def begin(config: EngineConfig) -> None:
    """What the model's folder says of the start."""
    fails, forks = (Path(config.model, f"{config.name}.{word}") for word in ("fails", "forks"))
    if fails.exists():
        fails.unlink()
        raise StartError("not this time")
    if forks.exists():
        forks.write_text(str(subprocess.Popen(["sleep", "infinity"]).pid))


def pipe(config: EngineConfig, word: str) -> int | None:
    """The open pipe of that name, if there is one."""
    path = Path(config.model, f"{config.name}.{word}")
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK) if path.exists() else None


async def written(descriptor: int) -> None:
    """Comes when something is in the pipe."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_reader(descriptor, event.set)
    await event.wait()
    asyncio.get_running_loop().remove_reader(descriptor)
    os.close(descriptor)


async def serve(config: EngineConfig) -> None:
    if config.model == "missing":
        raise StartError("there is no model missing")
    if config.model == "bug":
        raise RuntimeError("a bug while loading")
    if config.model == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        await asyncio.Event().wait()
    begin(config)
    if (before_ready := pipe(config, "before_ready")) is not None:
        await written(before_ready)
    print("words on stdout are not READY lines", os.environ["OMP_NUM_THREADS"])
    print(f"threads={config.threads} OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", file=sys.stderr)
    server = Server(config, "engine")
    await server.start()
    before_serving = pipe(config, "before_serving")
    if before_serving is None:
        await server.set_serving("", True)
    server.announce()
    if before_serving is not None:
        await written(before_serving)
        await server.set_serving("", True)
    await server.run()


if __name__ == "__main__":
    run_main("fake-engine", serve(parse_config(EngineConfig, sys.argv[1:], "fake-engine")))
