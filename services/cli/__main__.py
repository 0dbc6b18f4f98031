"""The entry of `microserve`, also as `python -m services.cli`."""

from __future__ import annotations

from services.rpc.entry import enter


def main() -> None:
    """The console script."""
    enter("services.cli.main")


if __name__ == "__main__":
    main()
