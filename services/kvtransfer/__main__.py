"""The entry of `microserve-kvtransfer`, also as `python -m services.kvtransfer`."""

from __future__ import annotations

from services.rpc.entry import enter


def main() -> None:
    """The console script."""
    enter("services.kvtransfer.process")


if __name__ == "__main__":
    main()
