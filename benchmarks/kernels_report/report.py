"""The table of what was compiled, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gptjet.benchmarks.kernels_report.collect import Compiled
from gptjet.benchmarks.kernels_report.limits import KIB, LIMITS, occupancy
from gptjet.kernels.gpu.tuning import CARDS, LATENCY_S

_FIRST_WITH_DOT = 80

_COLUMNS = (
    "launch",
    "card",
    "programs",
    "warps",
    "registers",
    "shared",
    "stack",
    "resident warps",
    "16 B loads",
    "KiB in flight",
    "KiB needed",
    "matrix units",
    "moved / minimum",
)

_LEGEND = """\
Compiled ahead of time, without a card, at GPT-J-6B's sizes. *resident warps*: of a multiprocessor,
by calculation, with what limits them. *16 B loads*: loads of 16 bytes that one thread waits for at
once, in its loop. *KiB in flight*: bytes that all resident programs of a multiprocessor wait for at
once. *KiB needed*: by Little's law, the card's datasheet bandwidth times {latency:.1f} microseconds
of latency, for one multiprocessor. *matrix units*: their instructions in its loop. *moved /
minimum*: bytes that all programs ask for, over bytes that no launch could do without; what is asked
for more than once comes from a cache."""


def problems(compiled: Iterable[Compiled]) -> list[str]:
    """One line for each thing that a card would not run, or would run slowly."""
    found = []
    for one in compiled:
        where = f"{one.module}: {one.name} on sm_{one.capability}"
        limit = LIMITS[one.capability].shared_per_block
        if one.error is not None:
            found.append(f"{where}: {one.error}")
            continue
        if one.stack:
            found.append(f"{where}: spills {one.stack} bytes a thread to the stack")
        if one.has_dot and one.capability < _FIRST_WITH_DOT:
            found.append(f"{where}: a tl.dot, which sm_{one.capability} computes on the stack")
        elif one.has_dot and not one.matrix_instructions:
            found.append(f"{where}: a tl.dot, and no instruction of the matrix units")
        if one.shared > limit:
            found.append(f"{where}: {one.shared} bytes of shared memory, limit {limit}")
        elif not occupancy(one.capability, one.num_warps, one.registers, one.shared).blocks:
            found.append(f"{where}: {one.registers} registers x {one.num_warps} warps do not fit")
    return found


def needed_bytes(capability: int) -> float:
    """Bytes that a multiprocessor must wait for at once to keep its share of the memory busy."""
    card = CARDS[capability]
    return card.bandwidth_gb_s * 1e9 * LATENCY_S / card.multiprocessors


def in_flight_bytes(one: Compiled) -> float:
    """Bytes that a multiprocessor's programs wait for at once, where the grid fills it."""
    fits = occupancy(one.capability, one.num_warps, one.registers, one.shared).blocks
    there = one.programs / CARDS[one.capability].multiprocessors
    return min(fits, there) * one.num_warps * 32 * one.bytes_in_flight


def markdown(compiled: Sequence[Compiled]) -> str:
    """A section a module, a table each."""
    parts = ["# What the compiler made of the GPU kernels", ""]
    parts += [_LEGEND.format(latency=LATENCY_S * 1e6), ""]
    for module in dict.fromkeys(one.module for one in compiled):
        rows = sorted(
            (one for one in compiled if one.module == module),
            key=lambda one: (one.name, one.capability),
        )
        parts += [f"## {module}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
        parts += [_line(_cells(one)) for one in rows]
        parts.append("")
    found = problems(compiled)
    parts += ["## Problems", "", *(f"- {line}" for line in found or ["none"]), ""]
    return "\n".join(parts)


def _cells(one: Compiled) -> list[str]:
    card = f"sm_{one.capability} {CARDS[one.capability].name}"
    first = [one.name, card, str(one.programs), str(one.num_warps)]
    if one.error is not None:
        return [*first, *["-"] * (len(_COLUMNS) - len(first))]
    fits = occupancy(one.capability, one.num_warps, one.registers, one.shared)
    return [
        *first,
        str(one.registers),
        str(one.shared),
        str(one.stack),
        f"{fits.warps} of {LIMITS[one.capability].warps} ({fits.limit})",
        str(one.wide_loads_in_flight),
        f"{in_flight_bytes(one) / KIB:.1f}",
        f"{needed_bytes(one.capability) / KIB:.1f}",
        one.matrix_instructions or "-",
        f"{one.bytes_moved / one.bytes_minimum:.3f}",
    ]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
