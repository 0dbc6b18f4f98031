"""Two nodes on one machine: network namespaces with a link between them that can be slow, lossy, or cut.

The test itself stays outside and reaches each node over a link of its own, which is never cut.
"""

from __future__ import annotations

import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x0001 | 0x1000
_MOST_PACKET_BYTES = 65_536
_PACKETS_WAITING = 1_000
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Node:
    """A namespace. `outside` is its address for the test, `inside` for the other node."""

    name: str
    outside: str
    inside: str

    @property
    def within(self) -> tuple[str, ...]:
        """Runs the command behind it on the node."""
        return ("ip", "netns", "exec", self.name)


@dataclass(frozen=True, slots=True)
class Link:
    """What lies between the nodes."""

    delay_s: float = 0.0
    loss: float = 0.0  # share of packets
    bits_per_second: int = 0  # 0: as fast as the machine

    @property
    def relayed(self) -> bool:
        """Whether packets go by way of this process. (Not every kernel has tc's netem.)"""
        return self.delay_s > 0 or self.loss > 0


class Network:
    """Two nodes and their link."""

    def __init__(self, first: Node, second: Node) -> None:
        self.first, self.second = first, second

    def cut(self) -> None:
        """Nothing passes between the nodes any more."""
        for node in (self.first, self.second):
            _ip("-n", node.name, "link", "set", "data0", "down")

    def heal(self) -> None:
        """Undoes cut."""
        for node in (self.first, self.second):
            _ip("-n", node.name, "link", "set", "data0", "up")

    @contextmanager
    def cut_for(self, seconds: float) -> Iterator[None]:
        """Begins with a link that is cut, and ends with one that has healed. A process of its own does it, which keeps
        to the time whatever becomes of this one meanwhile."""
        down, up = (f"ip -n {self.first.name} link set data0 {state}" for state in ("down", "up"))
        script = f"{down} && echo && sleep {seconds} && {up}"
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield
        assert process.returncode == 0


@contextmanager
def two_nodes(link: Link = Link()) -> Iterator[Network]:
    """Skips the test where namespaces cannot be made."""
    # A namespace that was deleted lives on for a while, and so do the names of its links.
    name, serial = f"{os.getpid()}-{next(_serial)}", os.getpid() % 200
    first = Node(f"microserve-a-{name}", f"10.213.{serial}.2", f"10.214.{serial}.1")
    second = Node(f"microserve-b-{name}", f"10.213.{serial}.6", f"10.214.{serial}.2")
    with ExitStack() as stack:
        for node in (first, second):
            made = subprocess.run(["ip", "netns", "add", node.name], capture_output=True, check=False)
            if made.returncode:
                pytest.skip("needs the right to make network namespaces")
            stack.callback(_ip, "netns", "del", node.name)
            _ip("-n", node.name, "link", "set", "lo", "up")
        for letter, node, gateway in (("a", first, f"10.213.{serial}.1"), ("b", second, f"10.213.{serial}.5")):
            outer = f"ms{letter}{name}"
            _ip("link", "add", outer, "type", "veth", "peer", "name", "outside", "netns", node.name)
            _ip("addr", "add", f"{gateway}/30", "dev", outer)
            stack.callback(_ip, "link", "del", outer)
            _ip("link", "set", outer, "up")
            _ip("-n", node.name, "addr", "add", f"{node.outside}/30", "dev", "outside")
            _ip("-n", node.name, "link", "set", "outside", "up")
        if link.relayed:
            stack.enter_context(_relay(first, second, link))
        else:
            ends = [("name", "data0", "netns", node.name) for node in (first, second)]
            _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node in (first, second):
            _ip("-n", node.name, "addr", "add", f"{node.inside}/24", "dev", "data0")
            _ip("-n", node.name, "link", "set", "data0", "up")
            if link.bits_per_second:
                limit = ["rate", f"{link.bits_per_second}bit", "burst", "16kb", "latency", "1s"]
                _run("tc", "-n", node.name, "qdisc", "add", "dev", "data0", "root", "tbf", *limit)
        yield Network(first, second)


@contextmanager
def _relay(first: Node, second: Node, link: Link) -> Iterator[None]:
    """A point-to-point link whose packets this process carries."""
    ends = [_tun(node) for node in (first, second)]
    stop, stopping = os.pipe()
    thread = threading.Thread(target=_carry, args=(ends, stop, link), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(stopping, b"x")
        thread.join()
        for descriptor in (*ends, stop, stopping):
            os.close(descriptor)


def _tun(node: Node) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"ms{os.getpid()}{node.name[11]}t"
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    _ip("link", "set", name, "netns", node.name, "name", "data0")
    return descriptor


def _carry(ends: list[int], stop: int, link: Link) -> None:
    dice = random.Random(1)
    waiting: list[tuple[float, int, int, bytes]] = []
    serial = 0
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select([*ends, stop], [], [], timeout)
        if stop in readable:
            return
        for end in readable:
            packet = os.read(end, _MOST_PACKET_BYTES)
            if dice.random() >= link.loss and len(waiting) < _PACKETS_WAITING:
                serial += 1
                other = ends[1] if end == ends[0] else ends[0]
                heapq.heappush(waiting, (time.monotonic() + link.delay_s, serial, other, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, other, packet = heapq.heappop(waiting)
            try:
                os.write(other, packet)
            except OSError:
                continue  # the interface is down: the packet is lost, as on any link


def _ip(*argv: str) -> None:
    _run("ip", *argv)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
