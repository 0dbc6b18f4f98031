"""A link of known speed between this machine's network and a namespace of its own."""

from __future__ import annotations

import os
import subprocess
from types import TracebackType

from services.cli.errors import CliError

_NEAR, _FAR = "198.18.97.1", "198.18.97.2"  # RFC 2544: set apart for measuring networks


class ShapedLink:
    """A veth pair into a new network namespace. Needs the right to make both; they are gone after the block."""

    near, far = _NEAR, _FAR

    def __init__(self) -> None:
        self.namespace = f"kvbench{os.getpid()}"
        self._device = f"kvb{os.getpid()}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What comes before a command that is to run at the far end."""
        return ("ip", "netns", "exec", self.namespace)

    def __enter__(self) -> ShapedLink:
        """Raises CliError where it is not permitted."""
        far, inside = f"{self._device}p", ("ip", "-n", self.namespace)
        try:
            _run("ip", "netns", "add", self.namespace)
            _run("ip", "link", "add", self._device, "type", "veth", "peer", "name", far, "netns", self.namespace)
            _run("ip", "address", "add", f"{_NEAR}/30", "dev", self._device)
            _run("ip", "link", "set", self._device, "up")
            _run(*inside, "address", "add", f"{_FAR}/30", "dev", far)
            _run(*inside, "link", "set", far, "up")
            _run(*inside, "link", "set", "lo", "up")
        except CliError:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def shape(self, bytes_per_s: float) -> None:
        """Limits what goes to the far end; a token bucket of about a millisecond."""
        burst = max(16_384, int(bytes_per_s / 1000))
        rate = f"{int(bytes_per_s * 8)}bit"
        shaper = ("tbf", "rate", rate, "burst", str(burst), "latency", "100ms")
        _run("tc", "qdisc", "replace", "dev", self._device, "root", *shaper)

    def close(self) -> None:
        """Takes everything away. Again is no error."""
        for command in (("ip", "link", "delete", self._device), ("ip", "netns", "delete", self.namespace)):
            subprocess.run(command, capture_output=True, check=False)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CliError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise CliError(f"{' '.join(command)}: {done.stderr.strip()}")
