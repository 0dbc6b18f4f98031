"""The entry of `microserve-router`, also as `python -m services.router`."""

from __future__ import annotations

from services.rpc.entry import enter


def main() -> None:
    """The console script."""
    enter("services.router.process")


if __name__ == "__main__":
    main()
