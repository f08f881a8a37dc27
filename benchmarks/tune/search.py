"""The search: one field of a tile at a time, from the modelled tile to one that no step betters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from gptjet.benchmarks.kernels_report.limits import LIMITS
from gptjet.kernels.gpu.compile_case import GPT_J_6B
from gptjet.kernels.gpu.tuning import (
    CARDS,
    DOT_LINEAR,
    DOT_ROWS,
    FIRST_WITH_ASYNC_COPIES,
    FIRST_WITH_DOT,
    WEIGHT_TYPES,
    Launch,
    Tile,
    TuningError,
    default_tile,
)
from gptjet.kernels.weights import INT4_GROUP

GEMV_ROWS = (1, 2, 4, 8)
ROWS = (*GEMV_ROWS, *DOT_ROWS)

# A field's candidates. tiles_per_program is searched as programs a multiprocessor, below.
_BLOCK_N = (1, 2, 4, 8, 16, 32)
_BLOCK_K = (1024, 2048, 4096, 8192)
_NUM_WARPS = (2, 4, 8, 16)
_NUM_STAGES = (1, 2, 3, 4)
_LOAD_BYTES = (4, 8, 16)
_PROGRAMS_PER_MULTIPROCESSOR = (1, 2, 4, 8, 16)

# Of dot_linear, whose tiles are of rows, too.
_DOT_BLOCK_M = (16, 32, 64, 128, 256)
_DOT_BLOCK_N = (32, 64, 128, 256)
_DOT_BLOCK_K = (64, 128, 256)
_DOT_NUM_STAGES = (2, 3, 4, 5)
_DOT_SPLIT_K = (1, 2, 3, 4, 6, 8, 12, 16)

# Beyond these nothing is kept in registers, and the compiler takes minutes to find that out.
_MOST_ACTIVATIONS = 160
_MOST_TILE_BYTES_PER_THREAD = 256
_MOST_SUMS_PER_THREAD = 128
_MOST_UNPACKED_PER_THREAD = 256
_BETTER = 0.995


class RefusedTileError(Exception):
    """A tile that gives no time: it does not compile, or its result is not the reference's."""


class Card(Protocol):
    """What times launches. See card.CudaCard."""

    @property
    def name(self) -> str:
        """Of the card, for the table."""

    @property
    def capability(self) -> int:
        """80 for 8.0."""

    def prepare(self, launch: Launch) -> None:
        """Make the tensors and the reference of the launches to come."""

    def seconds(self, launch: Launch, tile: Tile) -> float:
        """Of one launch, its result checked first. Raises RefusedTileError."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best tile of a launch, and how it came out; `refused` counts tiles that gave no time."""

    launch: Launch
    tile: Tile
    seconds: float
    default_seconds: float | None
    tried: int
    refused: int


def launches(capability: int) -> Iterator[Launch]:
    """The weight passes of GPT-J-6B: every kernel, weight type and row count."""
    hidden, inner = GPT_J_6B.hidden_size, GPT_J_6B.inner_size
    shapes = (
        ("layer_norm_linear", 3 * hidden + inner, hidden),
        ("gelu_linear_residual", hidden, hidden + inner),
        ("layer_norm_linear", GPT_J_6B.vocab_size, hidden),
    )
    for kernel, n, k in shapes:
        for weight_type in WEIGHT_TYPES:
            for rows in GEMV_ROWS:
                yield Launch(kernel, capability, rows, n, k, weight_type)
    if capability < FIRST_WITH_DOT:
        return
    for _, n, k in shapes:
        for weight_type in WEIGHT_TYPES:
            for rows in DOT_ROWS:
                yield Launch(DOT_LINEAR, capability, rows, n, k, weight_type)


def is_sensible(launch: Launch, tile: Tile) -> bool:
    """Whether registers and shared memory could hold it: what is not is not even compiled."""
    weight_bytes = WEIGHT_TYPES[launch.weight_type]
    if tile.block_m:
        return _is_sensible_dot(launch, tile, weight_bytes)
    threads = 32 * tile.num_warps
    if tile.num_stages > 2 and launch.capability < FIRST_WITH_ASYNC_COPIES:
        return False
    if launch.weight_type == "fp16" and tile.load_bytes != 16:
        return False
    # A thread holds the activations of all weights of its loads, of which a row needs so many.
    loads = max(1, tile.block_k * weight_bytes / (threads * tile.load_bytes))
    activations = launch.rows * loads * tile.load_bytes / weight_bytes
    tile_bytes = tile.block_n * tile.block_k * weight_bytes
    return (
        activations <= _MOST_ACTIVATIONS
        and tile_bytes / threads <= _MOST_TILE_BYTES_PER_THREAD
        and tile_bytes / threads >= tile.load_bytes
    )


def _is_sensible_dot(launch: Launch, tile: Tile, weight_bytes: float) -> bool:
    known = [number for number in LIMITS if number <= launch.capability]
    limit = LIMITS[max(known, default=min(LIMITS))].shared_per_block
    of_step = tile.block_k * (2 * tile.block_m + weight_bytes * tile.block_n)
    threads = 32 * tile.num_warps
    return (
        tile.num_stages * of_step <= limit
        and tile.block_m * tile.block_n / threads <= _MOST_SUMS_PER_THREAD
        and tile.block_n * tile.block_k / threads <= _MOST_UNPACKED_PER_THREAD
        # An INT4 tile has one scale an output.
        and (launch.weight_type != "int4" or tile.block_k <= INT4_GROUP)
        # A block of rows that are mostly not there is a smaller one's.
        and (tile.block_m == _DOT_BLOCK_M[0] or tile.block_m < 2 * launch.rows)
    )


def _dot_steps(launch: Launch, tile: Tile) -> Mapping[str, Iterable[Tile]]:
    return {
        "split_k": (_with_split(launch, tile, split_k=each) for each in _DOT_SPLIT_K),
        "block_n": (replace(tile, block_n=each) for each in _DOT_BLOCK_N),
        "block_m": (replace(tile, block_m=each) for each in _DOT_BLOCK_M),
        "num_stages": (replace(tile, num_stages=each) for each in _DOT_NUM_STAGES),
        "num_warps": (replace(tile, num_warps=each) for each in _NUM_WARPS),
        "block_k": (_with_split(launch, tile, block_k=each) for each in _DOT_BLOCK_K),
    }


def _with_split(launch: Launch, tile: Tile, **changes: int) -> Tile:
    """With as many splits as asked for, or the next fewer that leave none without a feature."""
    changed = {"block_k": tile.block_k, "split_k": tile.split_k, **changes}
    in_all = -(-launch.k // changed["block_k"])
    tiles = -(-in_all // changed["split_k"])
    return replace(
        tile, block_k=changed["block_k"], split_k=-(-in_all // tiles), tiles_per_program=tiles
    )


def steps(launch: Launch, tile: Tile) -> Iterator[tuple[str, tuple[Tile, ...]]]:
    """(field, the sensible tiles that differ in it) of each field, the one given left out."""
    fields: Mapping[str, Iterable[Tile]]
    fields = (
        _dot_steps(launch, tile)
        if tile.block_m
        else {
            "programs": (
                _with_programs(launch, tile, each) for each in _PROGRAMS_PER_MULTIPROCESSOR
            ),
            "block_n": (_with_block(launch, tile, block_n=each) for each in _BLOCK_N),
            "num_stages": (replace(tile, num_stages=each) for each in _NUM_STAGES),
            "num_warps": (replace(tile, num_warps=each) for each in _NUM_WARPS),
            "block_k": (_with_block(launch, tile, block_k=each) for each in _BLOCK_K),
            "load_bytes": (replace(tile, load_bytes=each) for each in _LOAD_BYTES),
        }
    )
    for name, tiles in fields.items():
        different = dict.fromkeys(each for each in tiles if each != tile)
        yield name, tuple(each for each in different if is_sensible(launch, each))


def search(launch: Launch, card: Card, note: Callable[[str], None] = lambda _: None) -> Found:
    """The fastest tile that one-field steps reach. Raises TuningError where none gives a time."""
    card.prepare(launch)
    times: dict[Tile, float | None] = {}

    def time_of(tile: Tile) -> float | None:
        if tile not in times:
            try:
                times[tile] = card.seconds(launch, tile)
            except RefusedTileError as error:
                times[tile] = None
                note(f"{launch.kernel} {launch.weight_type} rows {launch.rows}: {tile}: {error}")
        return times[tile]

    start = best = default_tile(launch)
    best_seconds = time_of(start)
    improved = True
    while improved:
        improved = False
        for _, tiles in steps(launch, best):
            for tile in tiles:
                seconds = time_of(tile)
                if seconds is None:
                    continue
                # A gain within the noise of two timings is none: the search would walk in circles.
                if best_seconds is None or seconds < best_seconds * _BETTER:
                    best, best_seconds, improved = tile, seconds, True
    if best_seconds is None:
        raise TuningError(f"no tile of {launch} gives a time; see the notes above")
    return Found(
        launch=launch,
        tile=best,
        seconds=best_seconds,
        default_seconds=times[start],
        tried=len(times),
        refused=sum(seconds is None for seconds in times.values()),
    )


def _with_block(launch: Launch, tile: Tile, **changes: int) -> Tile:
    """With another block, the number of programs kept as near as it goes."""
    changed = replace(tile, **changes)
    changed = replace(changed, split_k=-(-launch.k // changed.block_k))
    programs = tile.chunks(launch.n) * tile.split_k
    return _cut(launch, changed, programs)


def _with_programs(launch: Launch, tile: Tile, per_multiprocessor: int) -> Tile:
    known = [number for number in CARDS if number <= launch.capability]
    card = CARDS[max(known, default=min(CARDS))]
    return _cut(launch, tile, card.multiprocessors * per_multiprocessor)


def _cut(launch: Launch, tile: Tile, programs: int) -> Tile:
    """The same tiles, in at most so many programs."""
    tiles = -(-launch.n // tile.block_n)
    side_by_side = max(1, programs // tile.split_k)
    return replace(tile, tiles_per_program=-(-tiles // side_by_side))
