"""An engine's process, as the transfer service sees it: holds a pool's memory and raises ready counters."""

from __future__ import annotations

import os
import select
import sys

from services.rpc.pool_client import attach_pool
from tests.kvtransfer.pattern import pattern


def main(socket_path: str, ticket: str, seed: str) -> None:
    """Attaches and fills the pool, then does what the lines on stdin say: `slot layers` raises a counter, `fork` leaves
    a child behind that keeps everything open for as long as stdin does."""
    pool = attach_pool(socket_path, bytes.fromhex(ticket))
    pool.memory[:] = pattern(int(seed), len(pool.memory))
    print("ATTACHED", flush=True)
    for line in sys.stdin:
        if line == "fork\n":
            if os.fork() == 0:
                hang_up = select.poll()
                hang_up.register(0, 0)
                hang_up.poll()
                os._exit(0)
        else:
            slot, layers = line.split()
            pool.raise_ready(int(slot), int(layers))
        print("DONE", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
