"""An engine's process: one a model replica."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from importlib.util import find_spec

import grpc.aio
from microserve.engine.v1.engine_pb2_grpc import add_EngineServiceServicer_to_server

from services.engine.config import EngineConfig
from services.engine.core.api import Command, RequestKey
from services.engine.front.front import Front
from services.engine.kernels.compiling import COMPILING
from services.engine.kvlink.client import TransferClient
from services.engine.kvlink.link import KvLink
from services.engine.metrics import ENGINE, MAX_SEQUENCES, LoadCollector
from services.engine.registration import Registrar
from services.engine.servicer import EngineServicer, TransferView
from services.rpc.channel import make_channel
from services.rpc.config import describe, parse_config
from services.rpc.errors import StartError
from services.rpc.log import configure
from services.rpc.main import run_main
from services.rpc.server import Server
from services.rpc.tls import check_client

PROG = "microserve-engine"
SERVICE = "microserve.engine.v1.EngineService"
# How long the step that runs may take to end, when the grace is over.
STEP_PATIENCE_S = 5.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

log = logging.getLogger("services.engine")


async def serve(config: EngineConfig) -> None:
    """Serves until it is told to stop or the loop thread fails; then drains."""
    if find_spec("torch") is None:
        raise StartError("the extra `engine` is not installed: pip install '.[engine]' in the repository")
    # Imported here, because torch reads the thread variables when it is imported.
    from services.engine.replica import load_replica

    server = Server(config, "engine")
    server.watch_launcher()
    # Before a minute of loading.
    server.check()
    for tls in (config.kvtransfer_tls, config.register_tls):
        check_client(tls)
    replica = await asyncio.to_thread(load_replica, config)
    failed = False

    def submit(command: Command) -> None:
        loop.submit(command)

    def stopped() -> None:
        nonlocal failed
        failed = True
        server.set_serving(SERVICE, False)
        server.request_stop(0.0)

    def abandoned(key: RequestKey) -> None:
        if link is not None:
            link.abandon(key)

    async def drain() -> None:
        await registrar.leave()
        await front.drain()

    registrar = Registrar(config.register, config.register_token, config.register_tls)
    front = Front(submit, stopped, abandoned)
    link: KvLink | None = None
    channel: grpc.aio.Channel | None = None
    if config.kvtransfer is not None:
        channel = make_channel(config.kvtransfer, config.kvtransfer_tls)
        client = TransferClient(channel, replica.incarnation)
        link = KvLink(client, replica.pool_plan, lambda error: front.on_fatal(error))
    kv = replica.attached_pool(await link.start()) if link is not None else replica.private_pool()
    loop = replica.make_loop(kv, front, link)
    loop.start()
    collector = LoadCollector(lambda: front.loads.latest)
    identity = replica.identity()
    ENGINE.info(identity.shown)
    MAX_SEQUENCES.set(identity.max_batch_size)
    try:
        if link is not None:
            link.bind(submit)
        transfer = (lambda: TransferView(link.endpoint, link.transports)) if link is not None else None
        servicer = EngineServicer(front, identity, replica.model.tokenizer.files(), transfer)
        add_EngineServiceServicer_to_server(servicer, server.grpc)
        await server.start()
        await server.set_serving(SERVICE, True)
        COMPILING.report()
        log.info("serving", extra={"fields": describe(config)})
        server.announce()
        registrar.start(server.advertised)
        await server.run(on_drain=drain)
    finally:
        await registrar.leave()
        collector.close()
        has_ended = await asyncio.to_thread(loop.stop, STEP_PATIENCE_S)
        if link is not None:
            await link.close()
        if channel is not None:
            await channel.close()
        await asyncio.to_thread(replica.close)
    if not has_ended:
        # Something native holds the thread, and the interpreter cannot end beside it.
        log.critical("the loop thread does not end: leaving it behind")
        logging.shutdown()
        os._exit(1)
    if failed:
        raise SystemExit(1)


def main() -> None:
    """Runs as the command line says."""
    config = parse_config(EngineConfig, sys.argv[1:], PROG)
    configure("engine", level=config.log_level)
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(config.num_threads)))
    run_main(PROG, serve(config))
