"""Writes kernels/gpu/tuning.toml: a line a launch, sorted, to be read by people too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gptjet.benchmarks.files import write_atomically
from gptjet.kernels.gpu.tuning import MODELLED, Entry, Launch, Tile, default_tile, read_table

_HEADER = """\
# Tile shapes of the weight passes; what each number means stands in tuning.py (Tile, Launch).
# A launch that is not here gets tuning.default_tile, so that a line says something of its own only
# where its source is a measurement. Written by `python -m gptjet.benchmarks.tune` on a card, and by
# `python -m gptjet.benchmarks.tune --modelled` for the cards that nobody has tuned.
tiles = [
"""


def render(entries: Iterable[Entry]) -> str:
    """The table's text. `read_table` reads the same entries from it."""
    lines = []
    for entry in sorted(entries, key=lambda entry: _order(entry.launch)):
        values = {**asdict(entry.launch), **asdict(entry.tile), "source": entry.source}
        if not entry.tile.block_m:
            del values["block_m"]
        # A JSON string or number is a TOML one.
        pairs = ", ".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
        )
        lines.append(f"    {{ {pairs} }},\n")
    return _HEADER + "".join(lines) + "]\n"


def _order(launch: Launch) -> tuple[object, ...]:
    bits = ("fp16", "int8", "int4").index(launch.weight_type)
    return (launch.capability, launch.kernel, launch.n, launch.k, bits, launch.rows)


def merged(held: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """`new` in the place of what is held for the same launches."""
    entries = {entry.launch: entry for entry in (*held, *new)}
    return tuple(entries.values())


def modelled(launches: Iterable[Launch]) -> tuple[Entry, ...]:
    """What `default_tile` says of each, marked as modelled."""
    return tuple(Entry(launch, default_tile(launch), MODELLED) for launch in launches)


def measured(launch: Launch, tile: Tile, card: str) -> Entry:
    """An entry with the card's name as its source."""
    return Entry(launch, tile, f"measured on {card}")


def update(path: Path, new: Iterable[Entry]) -> None:
    """Put entries into the table at path, which need not be there. Raises TuningError, OSError."""
    held = read_table(path) if path.exists() else ()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(merged(held, new)))
