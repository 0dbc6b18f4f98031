"""How kernels are compiled, and where their machine code is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba
from numba import cfunc, extending, njit, types
from numba.core import event

from services.engine.kernels.compiling import COMPILING
from services.engine.model.cache import cache_root

_ENGINE = Path(__file__).parent.parent
_SOURCES = sorted([*_ENGINE.glob("kernels/*.py"), *_ENGINE.glob("**/*_kernels.py")])
_DIGEST = blake2b(b"".join(path.read_bytes() for path in _SOURCES), digest_size=8).hexdigest()

# numba compares only the file of the outermost function with what it kept. A folder named by all sources makes a
# change of an inner one count too. numba itself adds the processor and its own version to the key.
vars(numba.config)["CACHE_DIR"] = str(cache_root() / "kernels" / _DIGEST)

# numba's own types know too little of what these do.
intrinsic: Callable[..., Any] = extending.intrinsic
array_at: Callable[..., Any] = numba.carray  # type: ignore[attr-defined]
pointer_to: Callable[..., Any] = types.CPointer

# A kernel of a team computes chunk `chunk` of the job whose arguments, addresses and sizes, are the integers at `job`.
_KERNEL = types.void(pointer_to(types.int64), types.int64)

# Only a fault, of a model or a key that was never written, brings a NaN here, and then only into its own row. In
# attention it must show, which softmax.py takes care of.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp", "nnan"}


class _Listener(event.Listener):
    """Hears of the compiler's passes; what is kept on disk goes through none."""

    def on_start(self, event: Any) -> None:
        COMPILING.begun()

    def on_end(self, event: Any) -> None:
        COMPILING.ended()


event.register("numba:run_pass", _Listener())  # type: ignore[no-untyped-call]

_kept: list[Any] = []  # machine code whose address was given away must stay


def compiled(function: Callable[..., Any], *, fast: bool = True) -> Callable[..., Any]:
    """A function for Python and for other kernels, compiled at its first call; it runs without the GIL.

    With `fast`, sums may be taken in another order.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": _FAST_MATH if fast else False}
    made: Callable[..., Any] = _with_cache(lambda cache: njit(cache=cache, **options)(function))
    return made


def part_of_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call, compiled into each of them; unlike `compiled`, it may be made anew by a factory."""
    part: Callable[..., Any] = njit(error_model="numpy")(function)
    return part


def kernel(function: Callable[..., Any], *, fast: bool = True) -> int:
    """The address of a kernel for Team.run, compiled now."""
    options: dict[str, Any] = {"error_model": "numpy", "fastmath": _FAST_MATH if fast else False}
    made = _with_cache(lambda cache: cfunc(_KERNEL, cache=cache, **options)(function))
    _kept.append(made)
    return int(made.address)


def _with_cache(make: Callable[[bool], Any]) -> Any:
    try:
        return make(True)
    except (RuntimeError, OSError) as error:  # the user's cache cannot be written
        logging.getLogger(__name__).warning("kernels are compiled anew at every start: %s", error)
        return make(False)
