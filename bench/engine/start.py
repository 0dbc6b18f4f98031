"""What `make run` costs a user who waits for it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

TIMEOUT_S = 120.0
WARM_RUNS = 3


def start_figures() -> dict[str, float]:
    """Seconds from the command to the end of its answer of eight tokens, which bounds the time to the first of them.

    The first run finds files on the disk or in memory, as it happens; it is told apart as first_start_s. The median of
    three runs after it is start_to_first_token_s. Raises RuntimeError if one ends without an answer.
    """
    first = _start_s()
    return {
        "start_to_first_token_s": statistics.median(_start_s() for _ in range(WARM_RUNS)),
        "first_start_s": first,
    }


def _start_s() -> float:
    command = [sys.executable, "-m", "services.cli", "up", "--json", "--grpc-port", "0", "--http-port", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            for line in process.stdout or ():
                said = json.loads(line)
                if said.get("event") == "answer":
                    return time.perf_counter() - began
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)
    raise RuntimeError(f"`microserve up` ended with code {process.returncode} and no answer")
