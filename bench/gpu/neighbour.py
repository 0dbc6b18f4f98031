"""Another process that computes on the same device, as an engine does beside its transfer service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WAIT_S = 60.0
# Ends with its standard input, so that it outlives nobody.
_PROGRAM = """
import os, sys, threading, torch
matrix = torch.randn(2048, 2048, device=sys.argv[1], dtype=torch.bfloat16)
matrix @ matrix
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print("computing", flush=True)
while True:
    for _ in range(20):
        matrix @ matrix
    if matrix.is_cuda:
        torch.cuda.synchronize()
"""


@contextmanager
def busy_neighbour(device: torch.device) -> Iterator[subprocess.Popen[str]]:
    """Inside, a process that multiplies matrices on the device without a pause."""
    command = [sys.executable, "-c", _PROGRAM, str(device)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "computing\n":
            raise RuntimeError("the neighbour did not begin")
        yield process
    finally:
        try:
            process.communicate(timeout=_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
