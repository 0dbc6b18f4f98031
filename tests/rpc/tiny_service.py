"""A service with no methods, run as a process by test_process.py."""

from __future__ import annotations

import sys

from services.rpc.config import parse_config
from services.rpc.main import run_main
from services.rpc.server import Server, ServerConfig


async def serve(config: ServerConfig) -> None:
    server = Server(config, "tiny")
    await server.start()
    server.announce()
    await server.run()


if __name__ == "__main__":
    run_main("tiny", serve(parse_config(ServerConfig, sys.argv[1:], "tiny")))
