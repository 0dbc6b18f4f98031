"""A sender that speaks the data port's protocol byte by byte, as well or as badly as a test wants."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

from microserve.kvtransfer.v1 import data_pb2 as pb
from microserve.types.v1 import kv_pb2

from services.kvtransfer.convert import to_address, to_range
from services.kvtransfer.landing import Claim
from services.kvtransfer.transports.base import PEER_VERSION
from services.kvtransfer.transports.tcp.statement import Statement, proved
from services.kvtransfer.transports.tcp.wire import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    Header,
    Kind,
    decode_message,
    encode_message,
)
from services.rpc.bind import split_address
from tests.kvtransfer.engine import FakeEngine
from tests.kvtransfer.port import PATIENCE_S, DirectPort


class RawPeer:
    """One connection to the data port of a service in this process. `all` of them are closed after a test."""

    all: ClassVar[list[RawPeer]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.challenge = b""
        self.all.append(self)

    @classmethod
    async def connect(cls, port: DirectPort) -> RawPeer:
        """Without a word."""
        host, number = split_address(port.service.info().offers["tcp"].partition("://")[2])
        return cls(*await asyncio.open_connection(host, number, limit=MAX_MESSAGE_BYTES))

    @classmethod
    async def welcomed(cls, port: DirectPort) -> RawPeer:
        """After hello and welcome."""
        peer = await cls.connect(port)
        peer.hello(port.service.epoch)
        peer.challenge = (await peer.message()).welcome.challenge
        return peer

    def hello(self, epoch: bytes, version: int = PEER_VERSION) -> None:
        hello = pb.Hello(peer_version=version, epoch=bytes(16), target_epoch=epoch)
        self.say(encode_message(0, pb.DataMessage(hello=hello)))

    def say(self, data: bytes) -> None:
        self._writer.write(data)

    def open(self, number: int, address: kv_pb2.KvAddress, part: tuple[int, int], **changes: Any) -> None:
        """States a put that is an attempt of its own, unless `changes` say otherwise."""
        target, window = to_address(address), to_range(kv_pb2.TokenRange(begin=part[0], end=part[1]))
        fields: dict[str, Any] = {
            "address": target,
            "claim": Claim(window, 1, "raw"),
            "part": window,
            "source_layout": target.layout,
            "extent": target.whole,
            "checksum": False,
        }
        statement = Statement(**{**fields, **changes})
        message = pb.DataMessage(open=proved(statement, self.challenge, number))
        self.say(encode_message(number, message))

    async def header(self) -> Header:
        """The next frame that is no beat."""
        while True:
            header = Header.decode(await self._reader.readexactly(HEADER_BYTES))
            if header.kind is not Kind.BEAT:
                return header

    async def message(self) -> pb.DataMessage:
        async with asyncio.timeout(PATIENCE_S):
            header = await self.header()
            return decode_message(await self._reader.readexactly(header.length))

    async def refused(self) -> str:
        """The reason of the error that comes next, after which the connection ends."""
        reason: str = (await self.message()).error.reason
        # A reset, if not all was read of what was said.
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(PATIENCE_S):
                assert await self._reader.read() == b""
        await self.close()
        return reason

    async def is_cut(self) -> bool:
        """Whether the service ended the connection by now."""
        try:
            await self._writer.drain()
        except ConnectionError:
            return True
        await asyncio.sleep(0)
        return self._reader.at_eof()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def put(number: int, layer: int, begin: int, end: int, engine: FakeEngine, byte: int = 7) -> bytes:
    """A whole PUT frame."""
    length = (end - begin) * engine.shape.layer_token_bytes
    return Header(Kind.PUT, number, layer, begin, end, length).encode() + bytes([byte]) * length
