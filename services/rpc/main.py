"""How a service's process begins and ends: exit 0 after a drain, 2 with one line when it cannot start."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NoReturn

from services.protocol.errors import ServiceError
from services.rpc.errors import StartError
from services.rpc.printed import printed_as_records


class ServiceLoop(asyncio.SelectorEventLoop):
    """Its clock is asyncio's, but read without running Python: asyncio and every call read it again and again."""

    time = staticmethod(time.monotonic)


def run_main(prog: str, main: Coroutine[Any, Any, None]) -> NoReturn:
    """Runs `main` to its end, which is that of the process. StartError and ServiceError become one line on stderr and
    exit code 2. What anybody prints meanwhile goes to the log: standard output is for announce_ready."""
    try:
        with printed_as_records(), asyncio.Runner(loop_factory=ServiceLoop) as runner:
            runner.run(main)
    except (StartError, ServiceError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        # Ctrl-C once the signal handlers are gone again.
        raise SystemExit(130) from None
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Does what was registered for the end, and ends. To take the interpreter apart, with torch in it, would take a
    second of a core, and would wait for every thread."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is where the descriptor was closed before the start
            with suppress(OSError, ValueError):  # its reader may be gone, or it is closed
                stream.flush()
    os._exit(code)
