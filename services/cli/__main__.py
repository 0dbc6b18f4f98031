"""The entry of `microserve`: Ctrl-C ends it quietly while it is still importing the rest, which takes a second."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script, and python -m services.cli."""
    try:
        from services.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
