"""`python -m services.engine.parallel.worker FD`: a rank other than 0. Started by the engine, never by hand."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from services.engine.attention.factory import make_attention
from services.engine.core.runner import TorchRunner
from services.engine.loading import TORCH_DTYPES, load, set_torch_threads, torch_device
from services.engine.model.errors import ModelError
from services.engine.model.loader import LoadedModel
from services.engine.model.shard import Shard
from services.engine.parallel.collective import TorchCollective
from services.engine.parallel.messages import Compute, CopyPages, Done, Failed, Poison, PoolShape, RankTask
from services.engine.parallel.pool import pool_part
from services.rpc.errors import StartError
from services.rpc.log import configure


def main() -> None:
    """Serves rank 0 until it is gone."""
    # They are meant for the replica, and rank 0 says when it is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(connection.fileno(),), name="lifeline", daemon=True).start()
    task: RankTask = connection.recv()
    configure(f"engine rank {task.rank}", level=task.config.log_level)
    try:
        runner = _start(task, connection)
    except (StartError, ModelError, RuntimeError, ValueError) as error:
        connection.send(Failed(str(error)))
        raise SystemExit(1) from None
    connection.send(Done())
    while True:
        _obey(connection.recv(), runner, connection)


def _start(task: RankTask, connection: Connection) -> TorchRunner:
    config = task.config
    set_torch_threads(config)
    device = torch_device(config, task.rank)
    shard = Shard(task.rank, config.tp, TorchCollective(task.meeting_place, task.rank, config.tp, device))
    loaded: LoadedModel = load(config, device, shard)
    connection.send(Done())
    pool: PoolShape = connection.recv()
    descriptor = recv_handle(connection) if pool.shared else None
    kv = pool_part(pool.shape, shard, device, TORCH_DTYPES[config.kv_dtype_name], descriptor)
    model = loaded.model
    attention = make_attention(config.attention, kv, model.config, config.num_threads, model.dtype)
    return TorchRunner(model, attention, kv)


def _obey(message: Compute | CopyPages | Poison, runner: TorchRunner, connection: Connection) -> None:
    if isinstance(message, Compute):
        # What comes out is rank 0's; ours went into it on the way.
        runner.compute(message.copies, message.segments, None, lambda logits: None)
        return
    if isinstance(message, CopyPages):
        runner.copy_pages(message.copies)
    else:
        runner.poison(message.pages)
    connection.send(Done())


def _end_with(descriptor: int) -> None:
    """Ends this process when rank 0 closes its end or dies, also in the middle of a collective that would wait."""
    ends = select.poll()
    ends.register(descriptor, select.POLLRDHUP)
    ends.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
