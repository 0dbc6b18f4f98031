"""What `make run` costs a user who waits for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

TIMEOUT_S = 120.0


def start_to_first_token_s() -> float:
    """Seconds from the command to the end of its answer of eight tokens, which bounds the time to the first of them.

    Raises RuntimeError if it ends without an answer.
    """
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
