"""Runs a kernel in PTX without a GPU: those instructions that the copy kernel has, all threads of a block in step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_INSTRUCTION = re.compile(r"(?:@(?P<predicate>%\w+) )?(?P<name>[\w.]+) ?(?P<operands>.*)")
_PLACE = re.compile(r"\[(?P<base>%?\w+)(?:\+(?P<offset>\d+))?\]")
_TWO = {
    "add.u64": np.add,
    "or.b64": np.bitwise_or,
    "and.b64": np.bitwise_and,
    "mul.wide.u32": np.multiply,
    "setp.eq.u64": np.equal,
    "setp.ge.u64": np.greater_equal,
}
_BYTES = {"u8": 1, "u64": 8, "v4.u32": 16}


class Memory(Protocol):
    """What loads and stores reach; it refuses what is not there."""

    def load(self, address: int, num_bytes: int) -> bytes:
        """So many bytes."""

    def store(self, address: int, data: bytes) -> None:
        """Writes them."""


@dataclass(frozen=True)
class _Instruction:
    predicate: str | None
    name: str
    operands: list[str]


class Ptx:
    """The one kernel of a text."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*", "", text)
        self.name = re.findall(r"\.entry (\w+)", text)[0]
        self._parameters: list[str] = re.findall(r"\.param \.u64 (\w+)", text)
        self._labels: dict[str, int] = {}
        self._instructions: list[_Instruction] = []
        for statement in re.sub(r"(\w+):", r"\1: ;", text[text.index("{") + 1 : text.rindex("}")]).split(";"):
            self._add(" ".join(statement.split()))

    def run(self, arguments: Sequence[int], blocks: int, threads: int, memory: Memory) -> None:
        """A launch. Blocks run one after the other: they must not depend on each other."""
        for block in range(blocks):
            _Block(self._instructions, self._labels, memory, block, threads).run(
                dict(zip(self._parameters, arguments, strict=True))
            )

    def _add(self, statement: str) -> None:
        if statement.endswith(":"):
            self._labels[statement[:-1]] = len(self._instructions)
        elif statement and not statement.startswith("."):
            found = _INSTRUCTION.fullmatch(statement)
            assert found, statement
            operands = re.findall(r"{[^}]*}|\[[^\]]*\]|[^,\s]+", found["operands"])
            self._instructions.append(_Instruction(found["predicate"], found["name"], operands))


class _Block:
    """Threads at the lowest instruction that any of them is at go on together."""

    def __init__(
        self, instructions: list[_Instruction], labels: dict[str, int], memory: Memory, block: int, threads: int
    ) -> None:
        self._instructions, self._labels, self._memory = instructions, labels, memory
        self._at = np.zeros(threads, np.int64)
        self._registers: dict[str, NDArray[np.uint64]] = {
            "%tid.x": np.arange(threads, dtype=np.uint64),
            "%ntid.x": np.full(threads, threads, np.uint64),
            "%ctaid.x": np.full(threads, block, np.uint64),
        }

    def run(self, parameters: dict[str, int]) -> None:
        end = len(self._instructions)
        while (at := int(self._at.min())) < end:
            lanes = np.flatnonzero(self._at == at)
            instruction = self._instructions[at]
            self._at[lanes] += 1
            if instruction.predicate is not None:
                lanes = lanes[self._registers[instruction.predicate][lanes] != 0]
            if instruction.name == "bra":
                self._at[lanes] = self._labels[instruction.operands[0]]
            elif instruction.name == "ret":
                self._at[lanes] = end
            elif instruction.name == "ld.param.u64":
                self._set(instruction.operands[0], lanes, np.uint64(parameters[instruction.operands[1][1:-1]]))
            elif instruction.name.startswith(("ld.global.", "st.global.")):
                self._move(instruction, lanes)
            else:
                self._compute(instruction, lanes)

    def _compute(self, instruction: _Instruction, lanes: NDArray[np.int64]) -> None:
        target, *operands = instruction.operands
        values = [self._value(operand, lanes) for operand in operands]
        match instruction.name:
            case "mov.u32" | "mov.u64" | "cvt.u64.u32":
                self._set(target, lanes, values[0])
            case "mad.wide.u32" | "mad.lo.u64":
                self._set(target, lanes, values[0] * values[1] + values[2])
            case "selp.b64":
                self._set(target, lanes, np.where(values[2] != 0, values[0], values[1]))
            case name:
                self._set(target, lanes, _TWO[name](*values).astype(np.uint64))

    def _move(self, instruction: _Instruction, lanes: NDArray[np.int64]) -> None:
        num_bytes = _BYTES[instruction.name[10:]]
        is_load = instruction.name.startswith("ld")
        values, place = instruction.operands if is_load else reversed(instruction.operands)
        found = _PLACE.fullmatch(place)
        assert found, place
        registers = values.strip("{}").replace(" ", "").split(",")
        kind = np.dtype(f"<u{num_bytes // len(registers)}")
        addresses = self._value(found["base"], lanes) + np.uint64(found["offset"] or 0)
        assert not (addresses % num_bytes).any(), f"{instruction.name} at {addresses}"
        if is_load:
            # Once, where threads read the same.
            places, of_lane = np.unique(addresses, return_inverse=True)
            pieces = [self._memory.load(int(some[0]), len(some) * num_bytes) for some in _stretches(places, num_bytes)]
            rows = np.frombuffer(b"".join(pieces), kind).reshape(-1, len(registers))[of_lane]
            for register, column in zip(registers, rows.T, strict=True):
                self._set(register, lanes, column.astype(np.uint64))
            return
        rows = np.column_stack([self._registers[register][lanes] for register in registers]).astype(kind)
        for some in _stretches(addresses, num_bytes):
            self._memory.store(int(some[0]), rows[: len(some)].tobytes())
            rows = rows[len(some) :]

    def _value(self, operand: str, lanes: NDArray[np.int64]) -> NDArray[np.uint64]:
        if operand.startswith("%"):
            return self._registers[operand][lanes]
        return np.full(len(lanes), int(operand) & _MASK, np.uint64)

    def _set(self, register: str, lanes: NDArray[np.int64], value: NDArray[np.uint64] | np.uint64) -> None:
        everywhere = self._registers.setdefault(register, np.zeros(len(self._at), np.uint64))
        everywhere[lanes] = value


def _stretches(addresses: NDArray[np.uint64], num_bytes: int) -> list[NDArray[np.uint64]]:
    """Cut where one place does not lie right behind the one before."""
    return np.split(addresses, np.flatnonzero(np.diff(addresses) != num_bytes) + 1)
