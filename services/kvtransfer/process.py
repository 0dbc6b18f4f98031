"""A KV transfer service's process: one a node."""

from __future__ import annotations

import asyncio
import logging
import sys

from microserve.kvtransfer.v1.kvtransfer_pb2_grpc import add_KvTransferServiceServicer_to_server
from microserve.kvtransfer.v1.peer_pb2_grpc import add_KvPeerServiceServicer_to_server
from prometheus_client import REGISTRY

from services.kvtransfer.config import KvTransferConfig
from services.kvtransfer.errors import DeviceFailed
from services.kvtransfer.peer_client import PeerClient
from services.kvtransfer.service import KvTransfer
from services.kvtransfer.servicer import KvTransferServicer
from services.kvtransfer.transports.pull.servicer import KvPeerServicer
from services.rpc.config import describe, parse_config
from services.rpc.log import configure
from services.rpc.main import run_main
from services.rpc.server import Server

PROG = "microserve-kvtransfer"
SERVICE = "microserve.kvtransfer.v1.KvTransferService"
PEER_SERVICE = "microserve.kvtransfer.v1.KvPeerService"

log = logging.getLogger("services.kvtransfer")


async def serve(config: KvTransferConfig) -> None:
    """Serves until it is told to stop, then drains. Raises DeviceFailed when its GPU fails as a whole: engines keep
    their pools and hand them to the next process, which can do what this one cannot any more."""
    server = Server(config, "kvtransfer")
    service = KvTransfer(config, lambda: server.advertised, PeerClient(config.peer_tls).ask, REGISTRY)
    losing = asyncio.create_task(service.lost())
    losing.add_done_callback(lambda _: server.request_stop(grace_s=0))
    try:
        add_KvTransferServiceServicer_to_server(KvTransferServicer(service), server.grpc)
        add_KvPeerServiceServicer_to_server(KvPeerServicer(service.pull_sessions, service.pull_probes), server.grpc)
        await server.start()
        for name in (SERVICE, PEER_SERVICE):
            await server.set_serving(name, True)
        log.info("serving", extra={"fields": describe(config)})
        server.announce()
        await server.run(on_drain=service.drain)
        if losing.done():
            raise DeviceFailed(f"the GPU is lost: {losing.result()}")
    finally:
        losing.cancel()
        await service.close()


def main() -> None:
    """Runs as the command line says."""
    config = parse_config(KvTransferConfig, sys.argv[1:], PROG)
    configure("kvtransfer", level=config.log_level)
    run_main(PROG, serve(config))
