"""From source text to a program that is known to have the right shape."""

from __future__ import annotations

import asyncio
import inspect
import linecache
import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from services.router.errors import BadPolicy
from services.router.metrics import ABANDONED_POLICIES
from services.router.programs.params import ParamsSpec
from services.router.programs.program import Kind, Program
from services.router.programs.stack import MODULE_PREFIX, interrupt

log = logging.getLogger(__name__)

MAX_SOURCE_CHARACTERS = 1 << 16
LOAD_TIMEOUT_S = 5.0
GIVE_UP_TIMEOUT_S = 30.0
_BETWEEN_INTERRUPTS_S = 0.05
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def load_file(path: Path, kind: Kind) -> Program:
    """The program in a file, named after it. BadPolicy."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadPolicy(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return load_source(path.stem, source, kind, file=str(path))


async def load_upload(name: str, source: str, kind: Kind) -> Program:
    """As load_source, on a thread and bounded in time, since nobody has seen the code yet.

    Code that nobody waits for any more is interrupted, since its thread takes the interpreter from all requests.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Program] = loop.create_future()

    def settle(program: Program | None, error: BaseException | None) -> None:
        if not done.done():
            if program is None:
                done.set_exception(error or BadPolicy("not loaded"))
            else:
                done.set_result(program)

    def load() -> None:
        program, error = None, None
        try:
            program = load_source(name, source, kind)
        except BaseException as failure:
            error = failure
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, program, error)

    thread = threading.Thread(target=load, name=f"load {kind.function} {name}", daemon=True)
    thread.start()
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            return await done
    except TimeoutError:
        raise BadPolicy(f"{kind.function} {name} did not finish loading within {LOAD_TIMEOUT_S:g} s") from None
    finally:
        if done.cancelled():
            _end(thread, loop.time() + GIVE_UP_TIMEOUT_S)


def _end(thread: threading.Thread, give_up_at: float) -> None:
    """Interrupts what the thread loads, again and again, since a program may catch that or wait in native code."""
    if thread.ident is None or not thread.is_alive():
        return
    loop = asyncio.get_running_loop()
    program = interrupt(thread.ident)
    if program is not None and loop.time() >= give_up_at:
        ABANDONED_POLICIES.labels(program.name).inc()
        fields = {"policy": program.name, "where": program.where}
        log.error("a program that does not finish loading cannot be interrupted", extra={"fields": fields})
        return
    loop.call_later(_BETWEEN_INTERRUPTS_S, _end, thread, give_up_at)


def load_source(name: str, source: str, kind: Kind, *, file: str = "") -> Program:
    """Runs the source as a module and checks what it defined. BadPolicy says what is wrong."""
    if not _NAME.fullmatch(name):
        raise BadPolicy(f"{name[:80]!r} is no name for a {kind.function}: lower case letters, digits and underscores")
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise BadPolicy(f"{kind.function} {name} is longer than {MAX_SOURCE_CHARACTERS} characters")
    module = ModuleType(f"{MODULE_PREFIX}{kind.function}_{name}")
    module.__file__ = file or f"<{kind.function} {name}>"
    with _registered(module):
        _run(module, name, source, kind)
        function, params_type = getattr(module, kind.function, None), getattr(module, "Params", None)
        try:
            params = None if params_type is None else ParamsSpec.of(params_type)
            _check_shape(function, kind, takes_params=params is not None)
        except Exception as error:  # checks of the program's own may raise anything
            raise BadPolicy(f"{kind.function} {name}: {error}") from None
    # Tracebacks look lines up there.
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    summary = (inspect.getdoc(module) or inspect.getdoc(function) or "").partition("\n")[0]
    assert function is not None
    return Program(name, summary, source, file, function, params, kind)


@contextmanager
def _registered(module: ModuleType) -> Iterator[None]:
    """Dataclasses look their module up. One of each name stays, the latest that could be loaded: programs may be
    uploaded as often as one likes."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    except BaseException:  # also an interruption
        sys.modules.pop(module.__name__, None)
        if before is not None:
            sys.modules[module.__name__] = before
        raise


def _run(module: ModuleType, name: str, source: str, kind: Kind) -> None:
    try:
        exec(compile(source, str(module.__file__), "exec"), module.__dict__)
    except SyntaxError as error:
        raise BadPolicy(f"{kind.function} {name}: line {error.lineno}: {error.msg}") from None
    except BaseException as error:  # also SystemExit: whatever it raises, it cannot be loaded
        raised = f"raised {type(error).__name__} while loading: {str(error)[:200]}"
        raise BadPolicy(f"{kind.function} {name} {raised}") from None


def _check_shape(function: Any, kind: Kind, *, takes_params: bool) -> None:
    """ValueError unless it is what its kind wants, with one parameter more where there are Params."""
    if not kind.fits(function):
        raise ValueError(f"it has no {kind.wanted}")
    parameters = (*kind.parameters, "params") if takes_params else kind.parameters
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError:
        raise ValueError(f"its {kind.function} does not take {kind.function}({', '.join(parameters)})") from None
