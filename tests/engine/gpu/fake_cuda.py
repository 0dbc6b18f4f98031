"""A GPU without a GPU: its tensors have shapes, types and a device but no numbers (torch's FakeTensorMode).

What is on the CPU computes as ever. So the program that queues a step runs to its end, and this finds what a real
device would refuse, arguments on two devices above all, and what it would wait for: numbers that are read back, and
copies from memory that is not pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")  # what forgets to say which GPU uses number 0

aten = torch.ops.aten


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Inside, tensors can be on GPU."""
    fake = FakeTensorMode()
    with fake, _Python(), FakeCuda(fake) as mode:
        yield mode


class Phase(Enum):
    """What the CPU may do."""

    FREE = "wait for the device, which has only zeros"
    QUEUEING = "copy what is pinned"
    CAPTURING = "copy nothing"


class Waits(AssertionError):
    """The CPU would wait for the GPU, or a graph would not be captured."""


class OtherDevice(AssertionError):
    """An operation has arguments on the CPU and on the GPU."""


class FakeCuda(TorchDispatchMode):
    """Sends operations on the GPU's tensors to FakeTensorMode, and all others to the CPU."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake
        self._phase = Phase.FREE

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Inside, the CPU may do no more than that."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        is_read = func is aten._local_scalar_dense.default or (func is aten._to_copy.default and "cpu" in devices)
        if not any(isinstance(leaf, FakeTensor) for leaf in leaves) and "cuda" not in devices:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if is_read:
            self._require(self._phase is Phase.FREE, f"{func} reads numbers back")
            with unset_fake_temporarily():
                return func(torch.zeros(args[0].shape, dtype=args[0].dtype), **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            for each in args[:2]:
                if isinstance(each, Tensor) and each.device == CPU and each.dim() and each.numel():
                    self._check_copy(each, non_blocking)
            if not isinstance(args[0], FakeTensor) and func is aten.copy_.default:
                return args[0]
            args = tree_map(self._sent, args)
        with self._fake:
            return func(*tree_map(self._there, args), **tree_map(self._there, kwargs))

    def _check_copy(self, host: Tensor, non_blocking: bool) -> None:
        """A copy to or from the CPU's memory."""
        what = f"a copy of {tuple(host.shape)} {host.dtype}"
        self._require(self._phase is not Phase.CAPTURING, f"{what} in a graph")
        is_queued = non_blocking and getattr(host, "is_pinned_here", False)
        self._require(is_queued or self._phase is Phase.FREE, f"{what} that blocks, or of memory that is not pinned")

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise Waits(what)

    def _sent(self, leaf: Any) -> Any:
        return self._fake.from_tensor(leaf) if isinstance(leaf, Tensor) and leaf.device == CPU else leaf

    def _there(self, leaf: Any) -> Any:
        """An argument as the device has it: of what is on the CPU, a single number alone."""
        if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        if leaf.dim():
            raise OtherDevice(f"{tuple(leaf.shape)} {leaf.dtype} is on the CPU")
        return self._fake.from_tensor(leaf)


class _Python(TorchFunctionMode):
    """What torch's Python side asks of a device before it dispatches: without CUDA it would be refused there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func is torch.empty and kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], FakeTensor):
            part, indices = _indexed(args[0], args[1])
            if func is Tensor.__getitem__:
                return aten.index(part, indices) if indices else part
            value = args[2] if isinstance(args[2], Tensor) else torch.tensor(args[2], dtype=part.dtype)
            return aten.index_put_(part, indices, value) if indices else aten.copy_(part, value)
        if func in _READS and isinstance(args[0], FakeTensor):
            return _READS[func](aten._local_scalar_dense(args[0]))
        return _PLAIN.get(func, func)(*args, **kwargs)


_READS = {Tensor.__int__: int, Tensor.__float__: float, Tensor.__bool__: bool, Tensor.__index__: int}
_PLAIN = {Tensor.copy_: aten.copy_, Tensor.__invert__: aten.bitwise_not}


def _pinned(host: Tensor) -> Tensor:
    host.is_pinned_here = True  # type: ignore[attr-defined]
    return host


def _indexed(whole: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What numbers, slices and None make of a tensor, and the tensors that then index its axes; empty without any."""
    part, indices = whole, list[Tensor | None]()
    for each in index if isinstance(index, tuple) else (index,):
        if isinstance(each, int):
            part = part.select(len(indices), each)
            continue
        if isinstance(each, slice):
            part = aten.slice(part, len(indices), each.start, each.stop, each.step or 1)
        elif each is None:
            part = part.unsqueeze(len(indices))
        indices.append(each if isinstance(each, Tensor) else None)
    return part, indices if any(each is not None for each in indices) else []
