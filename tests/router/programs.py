"""Policies that tests write into files of their own."""

from __future__ import annotations

from pathlib import Path


def write(folder: Path, name: str, body: str) -> Path:
    """One of that name; its module has a list `leaked` and an event `stop`."""
    path = folder / f"{name}.py"
    header = "import asyncio\nleaked = []\nstop = asyncio.Event()\n\nasync def policy(request, fleet):\n"
    path.write_text(header + body + "\n")
    return path
