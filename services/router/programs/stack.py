"""Programs on a thread's stack: whose code it is, where it stands, and ending it there."""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

MODULE_PREFIX = "microserve_program_"  # of the name of a program's module, before its kind and "_"
_ROUTER = "services."
_FLEET = "services.router.fleet."


class ProgramInterrupted(BaseException):
    """Raised inside a program that does not end. No Exception: programs that try again must not swallow it."""


@dataclass(frozen=True, slots=True)
class OnStack:
    """A program on a stack: one run of it, where it stands, whether in code of the router that it calls."""

    run: int
    name: str
    where: str
    in_router: bool


def find(frame: FrameType | None) -> OnStack | None:
    """The program on the stack whose innermost frame that is, if there is one."""
    where = "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
    in_router = False
    while frame is not None:
        name = program_name(frame.f_globals)
        if name is not None:
            return OnStack(id(frame), name, where, in_router)
        in_router = in_router or str(frame.f_globals.get("__name__")).startswith(_ROUTER)
        frame = frame.f_back
    return None


def find_in(thread: int) -> OnStack | None:
    """The program that a thread runs at this moment, if it runs one."""
    return find(sys._current_frames().get(thread))


def interrupt(thread: int) -> OnStack | None:
    """Raises ProgramInterrupted in the program that another thread runs, and returns that program; None if it runs
    none. Code of the router that a program calls is not cut off, and a call into native code ends first: try again."""
    found = find_in(thread)
    if found is not None and not found.in_router:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(ProgramInterrupted))
    return found


def program_name(module: Mapping[str, Any]) -> str | None:
    """The name of the program whose module has these globals; None for any other module."""
    name = module.get("__name__")
    if not isinstance(name, str) or not name.startswith(MODULE_PREFIX):
        return None
    return name.removeprefix(MODULE_PREFIX).partition("_")[2]


def calling_line(frame: FrameType | None) -> int | None:
    """The line of the program that made the call whose frame that is; None if none did."""
    while frame is not None:
        if program_name(frame.f_globals) is not None:
            return frame.f_lineno
        frame = frame.f_back
    return None


def failed_line(raised: BaseException, culprit: BaseException | None = None) -> int | None:
    """The innermost line of a program that the exception came through; of a group, that which `culprit` in it came
    through, or its first one, and where that came through none, the group itself. None if there is no such line."""
    lines = _lines(raised)
    while isinstance(raised, BaseExceptionGroup):
        raised = next((each for each in raised.exceptions if _holds(each, culprit)), raised.exceptions[0])
        lines += _lines(raised)
    return lines[-1] if lines else None


def came_from_verb(error: BaseException) -> bool:
    """Whether it was raised in code of the fleet, and not by what a program made itself."""
    modules = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
    programs = [i for i, module in enumerate(modules) if program_name(module) is not None]
    behind = modules[programs[-1] + 1 :] if programs else modules
    return any(str(module.get("__name__")).startswith(_FLEET) for module in behind)


def _lines(raised: BaseException) -> list[int]:
    return [line for frame, line in traceback.walk_tb(raised.__traceback__) if program_name(frame.f_globals)]


def _holds(raised: BaseException, culprit: BaseException | None) -> bool:
    group = raised.exceptions if isinstance(raised, BaseExceptionGroup) else ()
    return raised is culprit or any(_holds(each, culprit) for each in group)
