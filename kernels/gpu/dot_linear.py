"""A weight pass on the matrix units, for 9 rows and more, on sm_80 and newer.

What it has over cuBLAS is what it does not move: INT8 and INT4 weights become float16 in registers,
on their way into the product, so that they cost 1 or 0.53 bytes of memory instead of being read,
written as float16 and read again. For float16 weights it has nothing over cuBLAS but its prologue.

Weights are the left factor, `out.T = weight @ x.T`: the left one may come from registers on every
card (the right one of Hopper's wgmma may not), and a block's outputs, of which there are many, fill
the 16 or 64 rows of an instruction where the rows of a small batch would not.

An INT4 weight is multiplied with its group's scale before the product, which rounds it to float16:
the same value that `dequantize_rows` gives cuBLAS. INT8 sums are scaled afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import CAPABILITIES, GPT_J_6B, CompileCase
from gptjet.kernels.gpu.gemv import FP16, INT8, arrived_last
from gptjet.kernels.gpu.gemv_cases import pointers_of, weight_num_bytes
from gptjet.kernels.gpu.gemv_launch import (
    SMALLEST_DOT_GROUP,
    Workspace,
    capability_of,
    described,
    weight_arguments,
    weight_type,
    workspace_for,
)
from gptjet.kernels.gpu.tuning import (
    DOT_LINEAR,
    FIRST_WITH_DOT,
    WEIGHT_TYPES,
    Tile,
    choose_tile,
)
from gptjet.kernels.weights import INT4_GROUP, Int4Weight, Weight

_OUT_DTYPES = (torch.float16, torch.float32)


@triton.jit
def _pairs(words, MASK: tl.constexpr, UNIT: tl.constexpr, MIDDLE: tl.constexpr):
    """Two levels of each word [BLOCK_N, words], less MIDDLE: [BLOCK_N, 2 * words] float16, exactly.

    MASK holds one in the lower half and one in the upper, each at UNIT times its size. 0x6400 is
    1024 in float16, of which a mantissa holds the integers below it as they are, so that a level
    becomes a number without a conversion. Exclusive or with 128 is plus 128 for a two's complement
    byte read as unsigned.

    All of it is the same for each word, and constants are constants: that lets the compiler do it
    behind the shuffle that the matrix units ask for, which is then one of bytes.
    """
    EXPONENT: tl.constexpr = 0x64006400 | (0x00800080 if MIDDLE == 128 else 0)
    bits = (words & MASK) ^ EXPONENT
    low = bits.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (bits >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    levels = tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])
    return levels * (1 / UNIT) - (1024 / UNIT + MIDDLE)


@triton.jit
def _dot_linear_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    rows,
    n,
    k,
    row_stride,
    scale_stride,
    x_stride,
    out_stride,
    steps,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
):
    """Program (block of outputs and block of rows, split of the features)."""
    # Blocks of rows side by side: what they share of the weights is in the second-level cache.
    row_blocks = tl.cdiv(rows, BLOCK_M)
    block = tl.program_id(0)
    split = tl.program_id(1)
    first_row = block % row_blocks * BLOCK_M
    first_output = block // row_blocks * BLOCK_N

    output = first_output + tl.arange(0, BLOCK_N)
    is_output = output < n
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < rows
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    # A column is a float16, or a word of four int8 or eight int4 weights.
    PER_COLUMN: tl.constexpr = 1 if KIND == FP16 else (4 if KIND == INT8 else 8)
    columns_ptr = weight_ptr if KIND == FP16 else weight_ptr.to(tl.pointer_type(tl.uint32))
    weight_rows = columns_ptr + output.to(tl.int64) * row_stride
    scale_rows = scale_ptr + output.to(tl.int64) * scale_stride
    column = tl.arange(0, BLOCK_K // PER_COLUMN)
    feature = tl.arange(0, BLOCK_K)

    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        first = (split * steps + step) * BLOCK_K
        columns = first // PER_COLUMN + column
        weight_mask = is_output[:, None]
        if not EVEN_K:
            weight_mask = weight_mask & (columns * PER_COLUMN < k)[None, :]
        tile = tl.load(weight_rows[:, None] + columns[None, :], mask=weight_mask, other=0)
        x_mask = is_row[:, None]
        if not EVEN_K:
            x_mask = x_mask & (first + feature < k)[None, :]
        x = tl.load(x_rows[:, None] + (first + feature)[None, :], mask=x_mask, other=0)
        if KIND == FP16:
            total = tl.dot(tile, tl.trans(x), total)
        elif KIND == INT8:
            # A word's bytes 0 and 2 are features 0 and 2: two products, of every other feature.
            even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_K // 2, 2]))
            weights = _pairs(tile, 0x00FF00FF, 1, 128)
            total = tl.dot(weights, tl.trans(even), total)
            weights = _pairs(tile >> 8, 0x00FF00FF, 1, 128)
            total = tl.dot(weights, tl.trans(odd), total)
        else:
            scale_mask = is_output
            if not EVEN_K:
                scale_mask = scale_mask & (first < k)
            scales = tl.load(scale_rows + first // GROUP, mask=scale_mask, other=0)[:, None]
            # Nibbles 0 and 4 are features 0 and 4: four products, of every fourth feature. The
            # higher nibble of a byte stays where it is, 16 times its size.
            even, odd = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_K // 4, 2, 2]))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            weights = _pairs(tile, 0x000F000F, 1, 8) * scales
            total = tl.dot(weights, tl.trans(x0), total)
            weights = _pairs(tile, 0x00F000F0, 16, 8) * scales
            total = tl.dot(weights, tl.trans(x1), total)
            weights = _pairs(tile >> 8, 0x000F000F, 1, 8) * scales
            total = tl.dot(weights, tl.trans(x2), total)
            weights = _pairs(tile >> 8, 0x00F000F0, 16, 8) * scales
            total = tl.dot(weights, tl.trans(x3), total)

    mask = is_output[:, None] & is_row[None, :]
    if SPLIT_K > 1:
        # [SPLIT_K, rows, n], added in the order of the splits by whichever program is last.
        where = partial_ptr + row.to(tl.int64)[None, :] * n + output[:, None]
        tl.store(where + split.to(tl.int64) * rows * n, total, mask=mask)
        if not arrived_last(arrivals_ptr + block, SPLIT_K):
            return
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for each in range(SPLIT_K):
            part = where + tl.cast(each, tl.int64) * rows * n
            # Past the first-level cache, which may hold a line of the launch before.
            total += tl.load(part, mask=mask, other=0, cache_modifier=".cg")
    if KIND == INT8:
        total *= tl.load(scale_ptr + output, mask=is_output, other=0).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=is_output, other=0).to(tl.float32)[:, None]
    where = out_ptr + row.to(tl.int64)[None, :] * out_stride + output[:, None]
    if ADD:
        total += tl.load(where, mask=mask, other=0)
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=mask)


def dot_linear(
    x: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    *,
    add: bool = False,
    workspace: Workspace | None = None,
    tile: Tile | None = None,
) -> None:
    """out [T, N] = x @ weight.T plus its bias, for any T; from 9 on it is worth it.

    x          [T, K] float16, a row's features together
    weight     [N, K]: float16, INT8, or INT4 in groups of at least 64, as `align_rows` gives it
    out        [T, N] float16 or float32, a row's outputs together; rows may stand apart
    add        add to `out`, which is float32 then
    workspace  needed where the tile's split_k is above 1; without one, such a launch makes its own,
               which a CUDA graph must not. `Workspace.for_weights` is enough for all
    tile       the tuning table's, if None

    The same as reference.linear, with sums in float32. Raises ValueError for a shape, dtype or
    layout that it does not take, and for a card below sm_80.
    """
    capability = capability_of(x.device)
    if x.device.type == "cuda" and capability < FIRST_WITH_DOT:
        raise ValueError(f"{DOT_LINEAR} needs sm_{FIRST_WITH_DOT} or newer, not sm_{capability}")
    rows, k = x.shape
    arguments = weight_arguments(weight)
    n = arguments.n
    _check(x, out, (n, arguments.k), add)
    if rows == 0:
        return
    if tile is None:
        tile = choose_tile(DOT_LINEAR, capability, rows, n, k, weight_type(weight))
    if tile.block_m == 0:
        raise ValueError(f"{DOT_LINEAR} needs a tile with a block_m, not {tile}")
    if isinstance(weight, Int4Weight):
        tile = _within_groups(tile, weight.group)
    tile.require_features(k)
    shared = workspace_for(x.device, rows, n, tile, workspace)
    blocks = triton.cdiv(rows, tile.block_m) * tile.chunks(n)
    _dot_linear_kernel[(blocks, tile.split_k)](
        x,
        arguments.values,
        arguments.scale,
        x if arguments.bias is None else arguments.bias,
        out,
        x if shared is None else shared.partials,
        x if shared is None else shared.arrivals,
        rows,
        n,
        k,
        arguments.row_stride,
        arguments.scale_stride,
        x.stride(0),
        out.stride(0),
        tile.tiles_per_program,
        **_constexprs(arguments.kind, arguments.group, k, tile),
        HAS_BIAS=arguments.bias is not None,
        ADD=add,
        num_warps=tile.num_warps,
        num_stages=1,
    )


def _within_groups(tile: Tile, group: int) -> Tile:
    """The same splits in tiles that have one scale an output."""
    if group < SMALLEST_DOT_GROUP:
        raise ValueError(
            f"{DOT_LINEAR} takes INT4 groups of at least {SMALLEST_DOT_GROUP}, not {group}"
        )
    if tile.block_k <= group:
        return tile
    tiles = tile.tiles_per_program * tile.block_k // group
    return replace(tile, block_k=group, tiles_per_program=tiles)


def _constexprs(kind: int, group: int, k: int, tile: Tile) -> dict[str, int]:
    return {
        "KIND": kind,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP": group,
        "SPLIT_K": tile.split_k,
        "EVEN_K": k == tile.split_k * tile.tiles_per_program * tile.block_k,
        "STAGES": tile.num_stages,
    }


def _check(x: torch.Tensor, out: torch.Tensor, shape: tuple[int, int], add: bool) -> None:
    n, k = shape
    if x.dtype != torch.float16 or x.dim() != 2 or x.shape[1] != k or (k > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be float16 [T, {k}], features together, not {described(x)}")
    if (
        out.dtype not in _OUT_DTYPES
        or out.shape != (x.shape[0], n)
        or (n > 1 and out.stride(1) != 1)
    ):
        raise ValueError(
            f"out must be float16 or float32 [{x.shape[0]}, {n}], outputs together, not "
            f"{described(out)}"
        )
    if add and out.dtype != torch.float32:
        raise ValueError(f"out must be float32 to be added to, not {out.dtype}")


_CASE_ROWS = (16, 64, 512)


def compile_cases() -> tuple[CompileCase, ...]:
    """Both passes of a block: decoding rows that fill one and four tiles of 16, and a prefill."""
    hidden, inner = GPT_J_6B.hidden_size, GPT_J_6B.inner_size
    shapes = (("w_in", 3 * hidden + inner, hidden), ("w_out", hidden, hidden + inner))
    return tuple(
        _case(name, n, k, kind, rows, capability)
        for name, n, k in shapes
        for kind in WEIGHT_TYPES
        for rows in _CASE_ROWS
        for capability in CAPABILITIES
        if capability >= FIRST_WITH_DOT
    )


def _case(name: str, n: int, k: int, kind: str, rows: int, capability: int) -> CompileCase:
    tile = choose_tile(DOT_LINEAR, capability, rows, n, k, kind)
    group = INT4_GROUP if kind == "int4" else 1
    adds = name == "w_out"
    constexprs = {
        **_constexprs(list(WEIGHT_TYPES).index(kind), group, k, tile),
        "HAS_BIAS": True,
        "ADD": adds,
    }
    types = {
        **pointers_of(kind),
        "x_ptr": "*fp16",
        "out_ptr": "*fp32" if adds else "*fp16",
    }
    blocks = triton.cdiv(rows, tile.block_m) * tile.chunks(n)
    weights = weight_num_bytes(kind, n, k)
    activations = 2 * rows * k
    outputs = rows * n * (8 if adds else 2)
    sums = 2 * 4 * tile.split_k * rows * n if tile.split_k > 1 else 0
    return CompileCase(
        name=f"{name} {kind} rows {rows}",
        kernel=_dot_linear_kernel,
        signature={
            argument: "constexpr" if argument in constexprs else types.get(argument, "i32")
            for argument in _dot_linear_kernel.arg_names
        },
        constexprs=constexprs,
        num_warps=tile.num_warps,
        programs=blocks * tile.split_k,
        bytes_moved=(
            weights * triton.cdiv(rows, tile.block_m)
            + activations * tile.chunks(n)
            + outputs
            + sums
        ),
        bytes_minimum=weights + activations + outputs,
        min_capability=capability,
        max_capability=capability,
        divisible_by_16=frozenset(
            {"n", "k", "row_stride", "scale_stride", "x_stride", "out_stride"}
            | ({"rows"} if rows % 16 == 0 else set())
            | ({"steps"} if tile.tiles_per_program % 16 == 0 else set())
        ),
    )
