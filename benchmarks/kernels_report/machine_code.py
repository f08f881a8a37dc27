"""Reads what the assembler made: resource usage, the global loads that wait at once, products."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
# "  /*0a10*/   @!P1 LDG.E.EF.128.SYS R36, [R52+0x2000] ;" of nvdisasm.
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x?\w+):")
_TARGET = re.compile(r"\((\.L_x?\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)((?:\.\w+)*)")


class MachineCodeError(ValueError):
    """The tools' output is not what this module knows."""


@dataclass(frozen=True, slots=True)
class Usage:
    """registers of a thread; stack and local memory of a thread, in bytes."""

    registers: int
    stack: int
    local: int


def parse_usage(text: str) -> Usage:
    """Of `cuobjdump -res-usage`. Raises MachineCodeError."""
    found = _USAGE.search(text)
    if found is None:
        raise MachineCodeError(f"no resource usage in: {text.strip()[:200]!r}")
    registers, stack, _, local = (int(number) for number in found.groups())
    return Usage(registers, stack, local)


@dataclass(frozen=True, slots=True)
class LoadsInFlight:
    """The most that one thread waits for at once: loads of 16 bytes, and bytes of any width."""

    wide: int
    num_bytes: int


@dataclass(slots=True)
class _Waiting:
    """Loads in the order in which they were asked for: (bytes, registers that they will fill).

    Copies to shared memory (cp.async) fill none and are waited for in groups.
    """

    loads: list[tuple[int, frozenset[int]]]
    groups: list[list[int]]

    def sizes(self) -> list[int]:
        return [size for size, _ in self.loads] + [size for one in self.groups for size in one]


def loads_in_flight(sass: str) -> LoadsInFlight:
    """The most that waits at once, of `nvdisasm -c`: inside its loops, or anywhere if it has none.

    Read in the order in which the code stands. A load waits until an instruction reads a register
    that it fills; that waits for it and for the ones before it. The body of a loop is read once,
    after what stands before it.
    """
    lines = list(_lines(sass))
    in_loop = _inside_loops(lines)
    waiting = _Waiting([], [[]])
    wide = num_bytes = 0
    for line, counts in zip(lines, in_loop, strict=True):
        if line.operation:
            _issue(waiting, line.operation.split("."), line.operands.split(","))
        if counts or not any(in_loop):
            sizes = waiting.sizes()
            wide = max(wide, sum(size == 16 for size in sizes))
            num_bytes = max(num_bytes, sum(sizes))
    return LoadsInFlight(wide, num_bytes)


# Ampere's, and Hopper's for a group of four warps. Others are integer's, and not used here.
_MATRIX = ("HMMA", "HGMMA")


def matrix_instructions(sass: str) -> str:
    """Those of the matrix units, of `nvdisasm -c`, "16 HMMA": in its loops, or anywhere else."""
    lines = list(_lines(sass))
    in_loop = _inside_loops(lines)
    counted = [line for line, counts in zip(lines, in_loop, strict=True) if counts] or lines
    names = [line.operation.split(".")[0] for line in counted]
    found = [f"{names.count(name)} {name}" for name in _MATRIX if name in names]
    return ", ".join(found)


@dataclass(frozen=True, slots=True)
class _Line:
    """An instruction, or a label."""

    operation: str = ""
    operands: str = ""
    label: str = ""


def _lines(sass: str) -> Iterator[_Line]:
    for text in sass.splitlines():
        label = _LABEL.match(text)
        found = _INSTRUCTION.search(text)
        if label is not None:
            yield _Line(label=label.group(1))
        elif found is not None:
            yield _Line(found.group(1), found.group(2))


def _inside_loops(lines: list[_Line]) -> list[bool]:
    """Whether each line stands between a label and a branch back to it.

    A branch to itself, which fills the end of a kernel, is no loop.
    """
    inside = [False] * len(lines)
    labels: dict[str, int] = {}
    for index, line in enumerate(lines):
        if line.label:
            labels[line.label] = index
        target = _TARGET.search(line.operands) if line.operation.startswith("BRA") else None
        start = labels.get(target.group(1)) if target is not None else None
        if start is not None and index > start + 1:
            inside[start : index + 1] = [True] * (index + 1 - start)
    return inside


def _issue(waiting: _Waiting, parts: list[str], fields: list[str]) -> None:
    """One more instruction: what it reads has arrived, what it loads is waited for."""
    is_load = parts[0] in ("LDG", "LD")
    writes = _filled(fields[0], _width(parts)) if is_load else frozenset()
    reads = _named(fields[1:] if is_load else fields)
    for index in range(len(waiting.loads) - 1, -1, -1):
        if waiting.loads[index][1] & (reads | writes):
            del waiting.loads[: index + 1]
            break
    if is_load:
        waiting.loads.append((_width(parts), writes))
    elif parts[0] == "LDGSTS":
        waiting.groups[-1].append(_width(parts))
    elif parts[0] == "LDGDEPBAR":
        waiting.groups.append([])
    elif parts[0] == "DEPBAR":
        # `DEPBAR.LE SB0, 0x2`: until at most so many groups are left.
        count = fields[1].strip() if len(fields) > 1 else ""
        left = int(count, 16) if count.startswith("0x") else 0
        del waiting.groups[: max(0, len(waiting.groups) - 1 - left)]


def _width(parts: list[str]) -> int:
    for part in parts[1:]:
        if part in ("128", "64"):
            return int(part) // 8
        if part in ("U8", "S8"):
            return 1
        if part in ("U16", "S16"):
            return 2
    return 4


def _filled(field: str, width: int) -> frozenset[int]:
    found = _REGISTER.search(field)
    if found is None:
        return frozenset()
    first = int(found.group(1))
    return frozenset(range(first, first + max(1, width // 4)))


def _named(fields: list[str]) -> frozenset[int]:
    """Registers named; a pair where the name says 64."""
    named = set()
    for field in fields:
        for number, suffix in _REGISTER.findall(field):
            named.add(int(number))
            if ".64" in suffix:
                named.add(int(number) + 1)
    return frozenset(named)
