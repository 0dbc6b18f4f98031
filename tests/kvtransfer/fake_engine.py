"""An engine's process, as the transfer service sees it: holds a pool's memory and raises ready counters."""

from __future__ import annotations

import os
import sys

from services.rpc.pool_client import attach_pool
from tests.kvtransfer.pattern import pattern


def main(socket_path: str, ticket: str, seed: str) -> None:
    """Attaches and fills the pool, then does what the lines on stdin say: `slot layers` raises a counter, `fork` leaves
    a child behind that keeps everything open for as long as stdin does."""
    pool = attach_pool(socket_path, bytes.fromhex(ticket))
    pool.memory[:] = pattern(int(seed), len(pool.memory))
    print("ATTACHED", flush=True)
    # Unbuffered, so that a forked child finds nothing read ahead.
    while line := os.read(0, 64).decode():
        if line == "fork\n":
            if os.fork() == 0:
                os.read(0, 1)
                os._exit(0)
        else:
            slot, layers = line.split()
            pool.raise_ready(int(slot), int(layers))
        print("DONE", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
