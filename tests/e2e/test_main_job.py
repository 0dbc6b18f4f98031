"""The main job as a person does it: make run, a typed question, the README's commands, Ctrl-C, and nothing left."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


class Up:
    """A running `microserve up`, started the way the README says."""

    def __init__(self, port: int, temporary: Path, *arguments: str, make: bool = False) -> None:
        options = ["--grpc-port", str(port), "--http-port", "0", *arguments]
        command = [BIN / "microserve", "up", *options]
        if make:
            command = ["make", "-C", ROOT, f"VENV={BIN.parent}", "run", f"ARGS={' '.join(options)}"]
        self.port = port
        self.output = ""
        # Files of the run, if any, lie here: the suite's own temporary folder.
        self.temporary = temporary
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(temporary)},
        )

    def read_until(self, words: str, timeout_s: float = 200) -> str:
        """Everything printed up to and with the line that contains `words`."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while words not in self.output:
            assert select.select([descriptor], [], [], timeout_s)[0], f"no {words!r} in: {self.output}"
            piece = os.read(descriptor, 65536)
            assert piece, f"ended without {words!r}: {self.output}"
            self.output += piece.decode(errors="replace")
        return self.output

    def descendants(self) -> list[int]:
        """Processes of the suite, by their parents."""
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(a): int(b) for a, b in (line.split() for line in listed.splitlines())}
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found - {self.process.pid})

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal as a terminal would, and returns the exit code."""
        os.killpg(self.process.pid, number)
        return self.process.wait(120)

    def close(self) -> None:
        """Makes sure that it is over."""
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def shared_memory(self) -> set[str]:
        """What a suite could leave outside its folder."""
        return {str(path) for path in Path("/dev/shm").glob("*microserve*")}


def gone(pids: list[int], timeout_s: float = 60) -> bool:
    """Whether all of the processes have ended, waiting for it."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([descriptor], [], [], timeout_s)[0]:
                return False
        finally:
            os.close(descriptor)
    return True


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    running = Up(free_ports(4), tmp_path_factory.mktemp("run"), make=True)
    try:
        running.read_until("; Ctrl-C stops it")
        yield running
        children = running.descendants()
        assert len(children) >= 4
        assert running.stop(signal.SIGINT) in (0, 2, 130, -signal.SIGINT)
        assert gone(children)
        assert not list(running.temporary.iterdir())
        assert not running.shared_memory()
    finally:
        running.close()


def test_make_run_answers_a_real_question(up: Up) -> None:
    assert "disaggregated" in up.output
    table = [line for line in up.output.splitlines() if re.search(r"prep_recv|remote_send|start_generate", line)]
    assert len(table) >= 3, up.output
    assert "engine-0" in up.output
    assert "engine-1" in up.output
    assert "Paris" in up.output, up.output


def test_a_typed_question(up: Up) -> None:
    asked = run(
        up, f"microserve ask 'What is the capital of France?' --max-tokens 24 --address localhost:{up.port} --json"
    )
    answer = json.loads(asked.splitlines()[-1])
    assert "Paris" in answer["text"]
    verbs = [leg["verb"] for leg in answer["legs"]]
    assert verbs == ["prep_recv", "remote_send", "start_generate"]
    assert answer["legs"][1]["engine"] != answer["legs"][2]["engine"]
    assert answer["legs"][1]["transferred_bytes"] > 0


@pytest.mark.parametrize("index", range(2, len(BLOCKS)))
def test_every_command_of_the_readme(up: Up, index: int) -> None:
    """All but `make run`, which started this suite, and `make test`, which is running."""
    output = run(up, BLOCKS[index])
    assert "rror" not in output, output
    if "RemoteSend" in BLOCKS[index]:
        replies = output[output.index("{") :]
        assert re.search(r'"transferred_?[tT]oken_?[cC]ount": 4', replies)
        assert '"FINISH_REASON_LENGTH"' in replies


def test_the_first_blocks_are_the_two_commands() -> None:
    assert [block.strip() for block in BLOCKS[:2]] == ["make run", "make test"]


def test_the_policy_in_the_readme_is_the_file(up: Up) -> None:
    (code,) = re.findall(r"^```python\n(async def .*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert code.strip() in (ROOT / "docs/examples/hello_policy.py").read_text()
    asked = run(
        up, "microserve ask 'Hello' --max-tokens 4 --json --policy disaggregated" + f" --address localhost:{up.port}"
    )
    assert json.loads(asked.splitlines()[-1])["output_tokens"] >= 1


def run(up: Up, commands: str) -> str:
    """Runs shell commands of the README against the suite's ports."""
    (http,) = re.findall(r"http://127\.0\.0\.1:(\d+)/v1", up.output)
    script = commands.replace(".venv/bin/", "").replace("localhost:8080", f"localhost:{http}")
    for offset in range(3):
        script = script.replace(f"localhost:{50050 + offset}", f"localhost:{up.port + offset}")
    script = re.sub(
        r"microserve (ask|engines|policy \w+)", rf"microserve \1 --address localhost:{up.port}", script, count=0
    )
    script = script.replace(f"--address localhost:{up.port} --address", "--address")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [BIN / "microserve", "up", "--grpc-port", str(port)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(port) in done.stderr
