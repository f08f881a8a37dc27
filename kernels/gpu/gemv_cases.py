"""Compile cases of both weight passes: their real launches, a weight type, row count and card."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from gptjet.kernels.gpu.compile_case import CAPABILITIES, CompileCase
from gptjet.kernels.gpu.gemv_launch import workspace_needs
from gptjet.kernels.gpu.tuning import WEIGHT_TYPES, Tile, choose_tile
from gptjet.kernels.weights import INT4_GROUP

_VALUES = {"fp16": "*fp16", "int8": "*i8", "int4": "*u8"}
_SCALES = {"fp16": "*fp16", "int8": "*fp32", "int4": "*fp16"}
_COLUMN_BYTES = {"fp16": 2, "int8": 4, "int4": 4}


def cases_of_weight_pass(
    kernel: Any,
    name: str,
    label: str,
    shape: tuple[int, int],
    *,
    rows: tuple[int, ...],
    pointers: Mapping[str, str],
    more: Mapping[str, object],
    program_bytes: int,
    feature_bytes: int = 0,
    out_bytes: int = 2,
) -> tuple[CompileCase, ...]:
    """One case for each weight type, row count and run of capabilities with the same tile.

    shape          (N, K)
    pointers       types of the arguments that only this kernel has
    more           constexprs that only this kernel has
    program_bytes  that a program reads beside weights, once a row, and
    feature_bytes  once a row and feature of its part
    out_bytes      an output, its residual's reading included
    """
    cases = []
    for weight_type in WEIGHT_TYPES:
        for count in rows:
            for first, last, tile in _by_tile(name, count, shape, weight_type):
                constexprs = {**_constexprs(weight_type, count, shape[1], tile), **more}
                cases.append(
                    CompileCase(
                        name=f"{label} {weight_type} rows {count}",
                        kernel=kernel,
                        signature=_signature(kernel, weight_type, pointers, constexprs),
                        constexprs=constexprs,
                        num_warps=tile.num_warps,
                        programs=tile.chunks(shape[0]) * tile.split_k,
                        min_capability=first,
                        max_capability=last,
                        divisible_by_16=frozenset(
                            {"n", "k", "width", "row_stride", "scale_stride", "exponent"}
                            | {"x_stride", "out_stride", "residual_stride"}
                            | {"attended_stride", "inner_stride"}
                        ),
                        **_bytes(
                            weight_type, count, shape, tile, program_bytes, feature_bytes, out_bytes
                        ),
                    )
                )
    return tuple(cases)


def _by_tile(
    name: str, rows: int, shape: tuple[int, int], weight_type: str
) -> Iterator[tuple[int, int, Tile]]:
    for capability in CAPABILITIES:
        tile = choose_tile(name, capability, rows, *shape, weight_type)
        yield capability, capability, tile


def _constexprs(weight_type: str, rows: int, k: int, tile: Tile) -> dict[str, object]:
    return {
        "ROWS": rows,
        "KIND": list(WEIGHT_TYPES).index(weight_type),
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": INT4_GROUP if weight_type == "int4" else 1,
        "SPLIT_K": tile.split_k,
        "EVEN_K": k == tile.split_k * tile.block_k,
        "VECTOR": tile.load_bytes // _COLUMN_BYTES[weight_type],
        "HAS_BIAS": True,
        "STAGES": tile.num_stages,
    }


def _signature(
    kernel: Any,
    weight_type: str,
    pointers: Mapping[str, str],
    constexprs: Mapping[str, object],
) -> dict[str, str]:
    types = {**pointers_of(weight_type), **pointers}
    return {
        argument: "constexpr" if argument in constexprs else types.get(argument, "i32")
        for argument in kernel.arg_names
    }


def pointers_of(weight_type: str) -> dict[str, str]:
    """Types of the pointers to a weight, its bias and a workspace."""
    return {
        "weight_ptr": _VALUES[weight_type],
        "scale_ptr": _SCALES[weight_type],
        "bias_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "arrivals_ptr": "*i32",
    }


def weight_num_bytes(weight_type: str, n: int, k: int) -> int:
    """Of a weight, its scales and its bias."""
    weights = int(n * k * WEIGHT_TYPES[weight_type]) + 4 * n
    if weight_type == "int8":
        weights += 4 * n
    elif weight_type == "int4":
        weights += 2 * n * math.ceil(k / INT4_GROUP)
    return weights


def _bytes(
    weight_type: str,
    rows: int,
    shape: tuple[int, int],
    tile: Tile,
    program_bytes: int,
    feature_bytes: int,
    out_bytes: int,
) -> dict[str, int]:
    n, k = shape
    weights = weight_num_bytes(weight_type, n, k)
    outputs = rows * n * out_bytes
    programs = tile.chunks(n) * tile.split_k
    beside = programs * rows * (program_bytes + feature_bytes * tile.block_k)
    sums = 2 * 4 * workspace_needs(rows, n, tile)[0]
    once = rows * k * (feature_bytes or 4)
    return {
        "bytes_moved": weights + outputs + beside + sums,
        "bytes_minimum": weights + outputs + once,
    }
