"""The entry of `microserve-engine`, also as `python -m services.engine`."""

from __future__ import annotations

from services.rpc.entry import enter


def main() -> None:
    """The console script."""
    enter("services.engine.process")


if __name__ == "__main__":
    main()
