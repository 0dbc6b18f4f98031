"""Starts, serves health, drains."""

from __future__ import annotations

import sys

from services.rpc.config import parse_config
from services.rpc.main import run_main
from services.rpc.server import Server
from tests.cli.fakes.config import KvTransferConfig


async def serve(config: KvTransferConfig) -> None:
    server = Server(config, "kvtransfer")
    await server.start()
    await server.set_serving("", True)
    server.announce()
    await server.run()


if __name__ == "__main__":
    run_main("fake-kvtransfer", serve(parse_config(KvTransferConfig, sys.argv[1:], "fake-kvtransfer")))
