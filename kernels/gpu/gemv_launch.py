"""The host's side of both weight passes: what a weight looks like to them, and their workspace.

Imports no Triton: the model aligns its weights and allocates with it before it launches anything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from gptjet.kernels.gpu.tuning import DOT_LINEAR, DOT_ROWS, Tile, choose_tile
from gptjet.kernels.weights import DenseWeight, Int4Weight, Int8Weight, Weight

MAX_ROWS = 8
"""Rows that a weight pass takes. From about there on the product is bound by arithmetic."""

ROW_BYTES = 16
"""A row of weights starts at a multiple of this, so that it is read in loads of that size."""

SMALLEST_DOT_GROUP = 64
"""Features of an INT4 group that dot_linear takes: an instruction's 16, of every fourth one."""

EXPONENT = 0x4B000000
"""The bits of 2^23 in float32: see gemv.py."""

# TRITON_MAX_TENSOR_NUMEL: a tile's products with all rows are one tensor.
_MOST_ELEMENTS = 1 << 20

# Of devices that are no card. The interpreter takes the tiles of the smallest one.
_assumed: ContextVar[int] = ContextVar("assumed capability", default=75)


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where split_k programs that share outputs leave their sums.

    partials  [elements] float32, with whatever is in it
    arrivals  [chunks] int32, zeros before each launch; each launch leaves zeros
    Launches on one stream may share it; launches that may run at the same time may not.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, device: torch.device | str, elements: int, chunks: int) -> Self:
        """One that is large enough for any launch that needs no more."""
        return cls(
            torch.empty(max(1, elements), dtype=torch.float32, device=device),
            torch.zeros(max(1, chunks), dtype=torch.int32, device=device),
        )

    @classmethod
    def for_weights(
        cls, device: torch.device | str, weights: Iterable[tuple[str, Weight]], max_rows: int
    ) -> Self:
        """One for launches of (kernel, weight) with 1 to max_rows rows and their own tiles."""
        elements = chunks = 0
        capability = capability_of(torch.device(device))
        shapes = {(kernel, *weight.shape, weight_type(weight)) for kernel, weight in weights}
        for kernel, n, k, kind in shapes:
            for rows in range(1, max_rows + 1):
                tile = choose_tile(kernel, capability, rows, n, k, kind)
                needed = workspace_needs(rows, n, tile)
                elements, chunks = max(elements, needed[0]), max(chunks, needed[1])
        return cls.allocate(device, elements, chunks)

    @classmethod
    def for_dot(
        cls, device: torch.device | str, passes: Iterable[tuple[int, Weight]], capability: int
    ) -> Self:
        """One for launches of dot_linear over (rows, weight), with that many rows or fewer."""
        elements = chunks = 0
        for rows, n, k, kind in {(rows, *w.shape, weight_type(w)) for rows, w in passes}:
            for most in (*(each for each in DOT_ROWS if each < rows), rows):
                tile = choose_tile(DOT_LINEAR, capability, most, n, k, kind)
                needed = workspace_needs(most, n, tile)
                elements, chunks = max(elements, needed[0]), max(chunks, needed[1])
        return cls.allocate(device, elements, chunks)


def workspace_needs(rows: int, n: int, tile: Tile) -> tuple[int, int]:
    """(elements, chunks) of the workspace of a launch: none where nothing is shared."""
    if tile.split_k == 1:
        return 0, 0
    row_blocks = -(-rows // tile.block_m) if tile.block_m else 1
    return tile.split_k * rows * n, row_blocks * tile.chunks(n)


@dataclass(frozen=True, slots=True)
class WeightArguments:
    """A weight as the kernels take it.

    values, scale  tensors to point to (values again where there is no scale)
    kind           index of the weight type: 0 fp16, 1 int8, 2 int4
    row_stride     in columns: float16 elements, or words of 4 bytes
    """

    values: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    kind: int
    n: int
    k: int
    row_stride: int
    scale_stride: int
    group: int
    column_bytes: int


def weight_type(weight: Weight) -> str:
    """The name of its type in the tuning table."""
    if isinstance(weight, DenseWeight):
        return "fp16"
    return "int8" if isinstance(weight, Int8Weight) else "int4"


def weight_arguments(weight: Weight) -> WeightArguments:
    """Raises ValueError for a weight that the kernels do not read; the message says what to do."""
    n, k = weight.shape
    scale_stride, group, column_bytes = 0, 1, 4
    if isinstance(weight, DenseWeight):
        values = scale = weight.weight
        if values.dtype != torch.float16:
            raise ValueError(f"a dense weight must be float16 on a GPU, not {values.dtype}")
        kind, column_bytes = 0, 2
    elif isinstance(weight, Int8Weight):
        values, scale, kind = weight.quantized, weight.scale, 1
    else:
        values, scale, kind = weight.packed, weight.scale, 2
        scale_stride, group = scale.stride(0), weight.group
        if group < 8 or group & (group - 1):
            raise ValueError(f"an INT4 group must be a power of two of at least 8, not {group}")
        if scale.stride(1) != 1 and scale.shape[1] > 1:
            raise ValueError("the INT4 scales of an output must stand together")
    row_bytes = values.stride(0) * values.element_size()
    if values.shape[1] > 1 and values.stride(1) != 1:
        raise ValueError("the weights of an output must stand together")
    if row_bytes % ROW_BYTES or values.data_ptr() % ROW_BYTES:
        raise ValueError(
            f"a row of weights must start at a multiple of {ROW_BYTES} bytes, and these are "
            f"{row_bytes} bytes apart: give the weight to align_rows once, when it is loaded"
        )
    return WeightArguments(
        values=values,
        scale=scale,
        bias=weight.bias,
        kind=kind,
        n=n,
        k=k,
        row_stride=row_bytes // column_bytes,
        scale_stride=scale_stride,
        group=group,
        column_bytes=column_bytes,
    )


def align_rows(weight: Weight) -> Weight:
    """The same weight with rows that start at multiples of ROW_BYTES; itself where they do.

    A copy has the same shape and values, and padding between its rows that nothing reads.
    """
    if isinstance(weight, DenseWeight):
        return replace(weight, weight=_aligned(weight.weight))
    if isinstance(weight, Int8Weight):
        return replace(weight, quantized=_aligned(weight.quantized))
    return replace(weight, packed=_aligned(weight.packed))


def _aligned(values: torch.Tensor) -> torch.Tensor:
    size = values.element_size()
    together = values.stride(1) == 1 or values.shape[1] <= 1
    apart = values.stride(0) * size
    if together and apart % ROW_BYTES == 0 and values.data_ptr() % ROW_BYTES == 0:
        return values
    n, columns = values.shape
    padded = -(-columns * size // ROW_BYTES) * ROW_BYTES // size
    copy = values.new_zeros(n, padded)[:, :columns]
    copy.copy_(values)
    return copy


def capability_of(device: torch.device) -> int:
    """80 for 8.0. Of another device the assumed one, by default the smallest card's."""
    if device.type != "cuda":
        return _assumed.get()
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index)


@contextmanager
def assume_capability(capability: int) -> Iterator[None]:
    """Within it, devices that are no card count as cards of that capability (75 for sm_75)."""
    token = _assumed.set(capability)
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def tile_for(
    kernel: str, device: torch.device, rows: int, weight: Weight, tile: Tile | None
) -> Tile:
    """`tile`, or the table's. Raises ValueError for too many rows or a tile that does not fit."""
    if not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"{kernel} takes 1 to {MAX_ROWS} rows, not {rows}")
    n, k = weight.shape
    if tile is None:
        tile = choose_tile(kernel, capability_of(device), rows, n, k, weight_type(weight))
    tile.require_features(k)
    elements = tile.block_n * tile.block_k * (1 << (rows - 1).bit_length())
    if elements > _MOST_ELEMENTS:
        raise ValueError(
            f"block_n = {tile.block_n} times block_k = {tile.block_k} for {rows} rows is "
            f"{elements} products; Triton's limit is {_MOST_ELEMENTS}"
        )
    if isinstance(weight, Int4Weight) and tile.block_k % weight.group:
        raise ValueError(f"block_k = {tile.block_k} must be a multiple of the group {weight.group}")
    return tile


def workspace_for(
    device: torch.device, rows: int, n: int, tile: Tile, workspace: Workspace | None
) -> Workspace | None:
    """The workspace given, a new one, or None where no output is shared.

    Raises ValueError where the one given is too small.
    """
    elements, chunks = workspace_needs(rows, n, tile)
    if chunks == 0:
        return None
    if workspace is None:
        return Workspace.allocate(device, elements, chunks)
    if workspace.partials.numel() < elements or workspace.arrivals.numel() < chunks:
        raise ValueError(
            f"the workspace must hold {elements} partial sums and {chunks} arrivals, not "
            f"{workspace.partials.numel()} and {workspace.arrivals.numel()}"
        )
    return workspace


def constexprs(weight: WeightArguments, rows: int, tile: Tile) -> dict[str, Any]:
    """What a launch is compiled for, as both kernels name it."""
    return {
        "ROWS": rows,
        "KIND": weight.kind,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": weight.group,
        "SPLIT_K": tile.split_k,
        "EVEN_K": weight.k == tile.split_k * tile.block_k,
        "VECTOR": tile.load_bytes // weight.column_bytes,
        "HAS_BIAS": weight.bias is not None,
        "STAGES": tile.num_stages,
    }


def described(tensor: torch.Tensor) -> str:
    """What a message says of a tensor that was not taken."""
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
