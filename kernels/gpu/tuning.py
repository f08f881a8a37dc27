"""Tile shapes: from the table in tuning.toml where it has the launch, from the roofline elsewhere.

    python -m gptjet.benchmarks.tune

measures tiles on the present card and writes the table again. Only numbers stand in it, so a tile
changes a kernel's speed and never its result beyond the order of float32 sums.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TABLE_PATH = Path(__file__).with_name("tuning.toml")

WEIGHT_TYPES: Mapping[str, float] = {"fp16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes a weight."""

MODELLED = "modelled"

DOT_LINEAR = "dot_linear"
"""The kernel on the matrix units; the others are GEMV kernels."""


class TuningError(ValueError):
    """A table or a tile is not usable; the message names the key and its limit."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a weight pass is cut into programs.

    block_n            outputs of a tile; a power of two
    block_k            features of a tile and of a program; a power of two
    num_warps          of a program; a power of two
    num_stages         1: a tile is loaded when it is multiplied; 2: one tile ahead, in registers;
                       3 and more: so many tiles ahead, in shared memory (sm_80 and newer)
    split_k            programs that share an output: block_k * split_k covers the features
    tiles_per_program  tiles that a program multiplies, one after another
    load_bytes         most bytes of one load of a thread: 16, 8 or 4. Activations stay in
                       registers, and a thread holds those of every weight that it loads
    block_m            rows of a tile of dot_linear, a power of two of at least 16; 0 for the GEMV
                       kernels, which multiply a tile with all rows. A program of dot_linear keeps
                       its outputs and walks over features: block_k * tiles_per_program * split_k
                       covers them, and num_stages tiles are on their way to shared memory
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int
    tiles_per_program: int = 1
    load_bytes: int = 16
    block_m: int = 0

    def __post_init__(self) -> None:
        for name, limit in _LARGEST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
                raise TuningError(f"{name} must be 1 to {limit}, not {value!r}")
        for name in ("block_n", "block_k", "num_warps"):
            value = getattr(self, name)
            if value & (value - 1):
                raise TuningError(f"{name} must be a power of two, not {value}")
        if self.load_bytes not in (4, 8, 16):
            raise TuningError(f"load_bytes must be 4, 8 or 16, not {self.load_bytes}")
        if self.block_m != 0:
            self._require_matrix_units()

    def _require_matrix_units(self) -> None:
        """Whole instructions: 16 rows, outputs and features, of INT4 of every fourth feature."""
        for name, least in (("block_m", 16), ("block_n", 16), ("block_k", 64)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 256:
                raise TuningError(f"{name} must be {least} to 256 for {DOT_LINEAR}, not {value!r}")
            if value & (value - 1):
                raise TuningError(f"{name} must be a power of two, not {value}")

    def require_features(self, k: int) -> None:
        """Raise TuningError unless the splits cover k features, none of them without one."""
        tiles = self.tiles_per_program if self.block_m else 1
        split = self.block_k * tiles
        if not (self.split_k - 1) * split < k <= self.split_k * split:
            many = f"{tiles} tiles" if self.block_m else "tiles"
            raise TuningError(
                f"split_k must be {-(-k // split)} for {k} features in {many} of "
                f"block_k = {self.block_k}, not {self.split_k}"
            )

    def chunks(self, n: int) -> int:
        """Programs side by side over n outputs."""
        return -(-n // (self.block_n * (1 if self.block_m else self.tiles_per_program)))


_LARGEST = {
    "block_n": 256,
    "block_k": 16384,
    "num_warps": 32,
    "num_stages": 6,
    "split_k": 64,
    "tiles_per_program": 4096,
    "load_bytes": 16,
}


@dataclass(frozen=True, slots=True)
class Card:
    """What a default is made from: datasheet bandwidth and multiprocessors of the usual card."""

    name: str
    bandwidth_gb_s: float
    multiprocessors: int


CARDS: Mapping[int, Card] = {
    70: Card("V100", 900, 80),
    75: Card("T4", 320, 40),
    80: Card("A100", 2039, 108),
    86: Card("A10", 600, 72),
    90: Card("H100", 3350, 132),
}
"""By capability, from NVIDIA's datasheets and architecture whitepapers."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What a tile is chosen for: `rows` activations times `weight_type` weights [n, k]."""

    kernel: str
    capability: int
    rows: int
    n: int
    k: int
    weight_type: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table. source: "modelled", or "measured on <card>"."""

    launch: Launch
    tile: Tile
    source: str


DOT_ROWS = (16, 32, 64, 128, 512)
"""Numbers of rows that dot_linear has tiles for; more than the last one take the last one's."""


def choose_tile(kernel: str, capability: int, rows: int, n: int, k: int, weight_type: str) -> Tile:
    """The tile of a launch: of the table, or `default_tile`. Cheap from the second time on.

    dot_linear takes any number of rows, and has tiles for those of DOT_ROWS: the next larger one.
    """
    if kernel == DOT_LINEAR:
        rows = next((most for most in DOT_ROWS if rows <= most), DOT_ROWS[-1])
    return _choose(Launch(kernel, capability, rows, n, k, weight_type))


@functools.lru_cache(maxsize=4096)
def _choose(launch: Launch) -> Tile:
    entry = _table().get(launch)
    return entry.tile if entry is not None else default_tile(launch)


# From asking for a line of device memory to its arrival, under load. An assumption for all cards,
# on the long side of what microbenchmarks show on idle ones (sjfeng1999/gpu-arch-microbenchmark:
# 1,000 to 1,200 cycles on a TU104, which is 0.6 to 0.7 microseconds); a busy memory answers later.
LATENCY_S = 0.8e-6
# Bytes of one tile that its program can hold beside the activations of so many rows. With the tile
# ahead it is held twice: 32 KiB are 64 registers of each of 256 threads.
_LARGEST_TILE_BYTES = ((2, 32 << 10), (4, 16 << 10), (8, 8 << 10))
FIRST_WITH_ASYNC_COPIES = 80
"""The first capability that copies to shared memory without registers (cp.async)."""

FIRST_WITH_DOT = 80
"""The first capability on which `tl.dot` is not computed on the stack."""

_WARPS = 8
_WAVES = 2


def default_tile(launch: Launch) -> Tile:
    """A tile by Little's law: what must be in flight is bandwidth times latency.

    Twice that for a multiprocessor, in tiles that registers can hold, by programs that are few
    enough to be resident at once in two waves: each makes its activations once and then only reads.
    """
    card = _nearest_card(launch.capability)
    if launch.kernel == DOT_LINEAR:
        return _default_dot_tile(launch, card)
    rows, weight_bytes = launch.rows, WEIGHT_TYPES[launch.weight_type]
    # Registers for activations: 16 features of a thread up to 4 rows, 8 beyond.
    widest = 4096 if rows <= 4 or launch.weight_type == "int4" else 2048
    block_k = _even_block_k(launch.k, widest)
    in_flight = 2 * card.bandwidth_gb_s * 1e9 * LATENCY_S / card.multiprocessors
    most = next(limit for up_to, limit in _LARGEST_TILE_BYTES if rows <= up_to)
    # Many rows leave no registers for a tile ahead; from sm_80 on it can wait in shared memory.
    is_asynchronous = rows > 2 and launch.capability >= FIRST_WITH_ASYNC_COPIES
    if is_asynchronous and launch.weight_type == "fp16":
        most *= 2
    block_n = _power_of_two(int(min(in_flight, most) / (block_k * weight_bytes)))
    block_n = max(2, min(block_n, int(most / (block_k * weight_bytes)), 16))
    split_k = -(-launch.k // block_k)
    resident = 2 if rows <= 2 or (is_asynchronous and rows <= 4) else 1
    programs = max(1, card.multiprocessors * resident * _WAVES // split_k)
    tiles = -(-launch.n // block_n)
    wide = launch.weight_type == "fp16" or rows <= 2
    return Tile(
        block_n=block_n,
        block_k=block_k,
        num_warps=_WARPS,
        num_stages=3 if is_asynchronous else 2,
        split_k=split_k,
        tiles_per_program=-(-tiles // programs),
        load_bytes=16 if wide else 8,
    )


# Tiles of features that a split of dot_linear multiplies at least: filling its stages costs two.
_LEAST_STEPS = 8
_DOT_STAGES = 3


def _default_dot_tile(launch: Launch, card: Card) -> Tile:
    """One block of rows as long as it goes, so that a weight is unpacked once.

    A step reads block_m * block_k * 2 bytes of activations from the second-level cache, which is
    some three times as fast as the memory, and block_n * block_k weights from the latter: more
    rows ask for more outputs. Programs, by splits of the features, until so much is in flight as
    `default_tile` asks for; more than one block of rows are bound by arithmetic, and not split.
    """
    weight_bytes = WEIGHT_TYPES[launch.weight_type]
    block_m = min(128, max(16, _power_of_two(launch.rows)))
    block_n = 64 if block_m == 16 else 128
    # Shared memory holds _DOT_STAGES of both; an A10 has 99 KiB of it.
    block_k = 128 if block_m <= 32 and weight_bytes < 2 else 64
    block_k = min(block_k, max(64, _power_of_two(launch.k)))
    steps = -(-launch.k // block_k)
    programs = -(-launch.n // block_n) * -(-launch.rows // block_m)
    in_flight = 2 * card.bandwidth_gb_s * 1e9 * LATENCY_S / card.multiprocessors
    of_a_program = (_DOT_STAGES - 1) * block_n * block_k * weight_bytes
    wanted = card.multiprocessors * max(2, round(in_flight / of_a_program))
    most = max(1, min(steps // _LEAST_STEPS, _LARGEST["split_k"]))
    split_k = min(most, -(-wanted // programs)) if launch.rows <= block_m else 1
    tiles = -(-steps // split_k)
    return Tile(
        block_n=block_n,
        block_k=block_k,
        num_warps=4 if block_m <= 32 else 8,
        num_stages=_DOT_STAGES,
        split_k=-(-steps // tiles),
        tiles_per_program=tiles,
        block_m=block_m,
    )


def _even_block_k(k: int, widest: int) -> int:
    """The widest block whose last split is nearly as long as the others, or the least uneven one.

    Programs of a short last split stand idle while the others read. A single split may be short.
    """
    if k <= widest:
        return max(128, _power_of_two(k))
    blocks = (widest, widest // 2, widest // 4)
    missing = {block: -k % block for block in blocks}
    even = [block for block in blocks if missing[block] <= k // 8]
    return even[0] if even else min(blocks, key=lambda block: missing[block])


def _nearest_card(capability: int) -> Card:
    """The newest listed one that is not newer than the card at hand."""
    known = [number for number in CARDS if number <= capability]
    return CARDS[max(known, default=min(CARDS))]


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


@functools.lru_cache(maxsize=1)
def _table() -> Mapping[Launch, Entry]:
    return {entry.launch: entry for entry in read_table(TABLE_PATH)}


def forget_table() -> None:
    """Have choose_tile read the table anew: for who has written to it."""
    _table.cache_clear()
    _choose.cache_clear()


_LAUNCH_TYPES = {field.name: field.type for field in fields(Launch)}
_TILE_NAMES = tuple(field.name for field in fields(Tile))


def read_table(path: Path) -> tuple[Entry, ...]:
    """The entries of a table. Raises TuningError, which names the file, the line and the key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TuningError(f"{path}: {error}") from error
    unknown = sorted(set(document) - {"tiles"})
    if unknown:
        raise TuningError(f"{path}: unknown key {unknown[0]!r}; only tiles is known")
    lines = document.get("tiles", [])
    if not isinstance(lines, list):
        raise TuningError(f"{path}: tiles must be a list of tables")
    entries: dict[Launch, Entry] = {}
    for number, line in enumerate(lines):
        where = f"{path}: tiles[{number}]"
        try:
            entry = _entry(line)
        except TuningError as error:
            raise TuningError(f"{where}: {error}") from None
        if entry.launch in entries:
            raise TuningError(f"{where}: {entry.launch} is in the table already")
        entries[entry.launch] = entry
    return tuple(entries.values())


def _entry(line: Any) -> Entry:
    if not isinstance(line, Mapping):
        raise TuningError(f"must be a table, not {line!r}")
    # Only a tile of the matrix units is one of rows, too.
    of_dot = ("block_m",) if line.get("kernel") == DOT_LINEAR else ()
    known = {*_LAUNCH_TYPES, *_TILE_NAMES, "source"} - ({"block_m"} - {*of_dot})
    for key in line:
        if key not in known:
            raise TuningError(f"unknown key {key!r}")
    for key in ("source", *_LAUNCH_TYPES, *_TILE_NAMES[:5], *of_dot):
        if key not in line:
            raise TuningError(f"{key} is missing")
    source = line["source"]
    if source != MODELLED and not str(source).startswith("measured on "):
        raise TuningError(f'source must be "{MODELLED}" or "measured on <card>", not {source!r}')
    for key, kind in _LAUNCH_TYPES.items():
        value = line[key]
        if kind == "str" and not isinstance(value, str):
            raise TuningError(f"{key} must be a string, not {value!r}")
        if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TuningError(f"{key} must be an integer of at least 1, not {value!r}")
    if line["weight_type"] not in WEIGHT_TYPES:
        raise TuningError(
            f"weight_type must be one of {', '.join(WEIGHT_TYPES)}, not {line['weight_type']!r}"
        )
    launch = Launch(**{key: line[key] for key in _LAUNCH_TYPES})
    if launch.kernel == DOT_LINEAR and launch.capability < FIRST_WITH_DOT:
        raise TuningError(
            f"{DOT_LINEAR} needs sm_{FIRST_WITH_DOT} or newer, not sm_{launch.capability}"
        )
    tile = Tile(**{key: line[key] for key in _TILE_NAMES if key in line})
    tile.require_features(launch.k)
    return Entry(launch, tile, source)
