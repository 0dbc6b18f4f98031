"""How a service's process begins and ends: exit 0 after a drain, 2 with one line when it cannot start."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any

from services.protocol.errors import ServiceError
from services.rpc.errors import StartError


def run_main(prog: str, main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` to its end. StartError and ServiceError become one line on stderr and exit code 2."""
    try:
        asyncio.run(main)
    except (StartError, ServiceError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        # Ctrl-C before the signal handlers were in place.
        raise SystemExit(130) from None
