"""What stands between two transfer services and alters KV on its way, as failing memory or a network card would."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.cli.process import ServiceProcess
from services.kvtransfer.transports.tcp.wire import HEADER_BYTES, Header, Kind


class Relay:
    """Passes on connections to the data port of one service, in the clear."""

    def __init__(self) -> None:
        self.address = ""
        self.target_port = 0
        self.alters = False  # one bit of every frame of KV
        self.num_altered = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes it."""
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        ways = [asyncio.create_task(self._frames(reader, far_writer)), asyncio.create_task(_all(far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in (writer, far_writer):
                each.close()

    async def _frames(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                body = bytearray(await reader.readexactly(Header.decode(header).length))
                if self.alters and Header.decode(header).kind is Kind.PUT:
                    body[len(body) // 2] ^= 1
                    self.num_altered += 1
                writer.write(header + body)
                await writer.drain()


async def _all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def relay() -> AsyncIterator[Relay]:
    """Listens until the block ends; who listens behind it must be said before anybody comes."""
    one = Relay()
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.address = "{}:{}".format(*server.sockets[0].getsockname())
    try:
        yield one
    finally:
        server.close()


def data_port_of(service: ServiceProcess) -> int:
    """The port where a transfer service listens for others: the one that it does not tell of when it is ready."""
    told = {service.address, service.metrics}
    owned = set()
    for entry in Path(f"/proc/{service.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            owned.add(os.readlink(entry))
    ports = set()
    for line in Path(f"/proc/{service.pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in owned:
            ports.add(int(local.partition(":")[2], 16))
    (port,) = ports - {int(address.rpartition(":")[2]) for address in told if address}
    return port
