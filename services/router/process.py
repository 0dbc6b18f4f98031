"""A router's process: python -m services.router --listen 127.0.0.1:50050 --engine 127.0.0.1:50051"""

from __future__ import annotations

import logging
import os
import sys

from services.router.app import Router
from services.router.config import RouterConfig
from services.rpc.config import describe, parse_config
from services.rpc.heap import settle_heap
from services.rpc.log import configure
from services.rpc.main import run_main

PROG = "microserve-router"
EXIT_STUCK = 70  # sysexits.h: internal software error

log = logging.getLogger(__name__)


def main() -> None:
    """Runs as the command line says."""
    config = parse_config(RouterConfig, sys.argv[1:], PROG)
    configure("router", level=config.log_level)
    run_main(PROG, _serve(config))


async def _serve(config: RouterConfig) -> None:
    router = Router(config, on_stuck=_end_stuck)
    try:
        log.info("starting", extra={"fields": describe(config)})
        addresses = await router.start()
        settle_heap()
        router.server.announce(metrics=addresses.http)
        await router.run()
    finally:
        await router.close()
    if router.num_running:
        # Leaving the loop would wait for them for ever.
        log.error("ending with programs that do not", extra={"fields": {"count": router.num_running}})
        logging.shutdown()
        os._exit(0)


def _end_stuck() -> None:
    """The event loop can do nothing any more, not even end: the supervisor starts another router."""
    logging.shutdown()
    os._exit(EXIT_STUCK)
