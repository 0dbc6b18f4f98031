"""An engine whose launcher is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import make_tiny_llama

pytestmark = pytest.mark.slow


def test_an_engine_that_is_not_ready_yet_ends_with_its_launcher(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a KV transfer service that never answers
        silent.settimeout(120)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "services.engine", "--model", str(make_tiny_llama(tmp_path)), "--threads", "1"]
        command += ["--listen", "127.0.0.1:0", "--kvtransfer", address, "--lifeline-fd", str(read_end)]
        engine = subprocess.Popen(command, pass_fds=[read_end], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            os.close(read_end)
            connection, _ = silent.accept()
            with connection:
                os.close(write_end)
                assert engine.wait(60) == -signal.SIGTERM
        finally:
            engine.kill()
            engine.wait()
