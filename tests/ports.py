"""Ports that a test names, because something returns to them or others count on from them."""

from __future__ import annotations

import random
import socket


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, none of which the system gives to whoever asks for any."""
    firsts = range(21_000, 29_000, count)
    for first in random.sample(firsts, len(firsts)):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return first
    raise AssertionError("no free ports")
