"""LayerNorm and the weight pass behind it, for 1 to 8 rows: a block's first, and the logits.

The LayerNorm is made again by each program, in registers, rather than by a kernel of its own: its
inputs come from the second-level cache, 48 KiB for a program that then reads megabytes of weights,
while a launch more in each block would stand idle for 2 to 3 microseconds of the 130 (FP16) or 35
(INT4) that an H100 needs for a block of GPT-J-6B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase
from gptjet.kernels.gpu.gemv import (
    arrived_last,
    by_place,
    combine,
    load_tile,
    scalars,
    sums_over,
    walk,
)
from gptjet.kernels.gpu.gemv_cases import cases_of_weight_pass
from gptjet.kernels.gpu.gemv_launch import (
    EXPONENT,
    Workspace,
    constexprs,
    described,
    tile_for,
    weight_arguments,
    workspace_for,
)
from gptjet.kernels.gpu.tuning import Tile
from gptjet.kernels.weights import Weight

KERNEL = "layer_norm_linear"
_OUT_DTYPES = (torch.float16, torch.float32)


@triton.jit
def _layer_norm_linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    eps,
    n,
    k,
    row_stride,
    scale_stride,
    x_stride,
    out_stride,
    tiles,
    exponent,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0) % SPLIT_K
    chunk = tl.program_id(0) // SPLIT_K
    first_output = chunk * tiles * BLOCK_N
    end_output = tl.minimum(n, first_output + tiles * BLOCK_N)
    in_register = exponent + (n >> 31)
    weights = (weight_ptr, scale_ptr, bias_ptr, k, row_stride, scale_stride, in_register)
    ahead = ()
    if STAGES == 2:
        ahead = load_tile(
            weights,
            first_output,
            end_output,
            split * BLOCK_K,
            KIND,
            BLOCK_N,
            BLOCK_K,
            GROUP,
            EVEN_K,
            VECTOR,
            HAS_BIAS,
        )

    feature = split * BLOCK_K + tl.arange(0, BLOCK_K)
    whole = tl.arange(0, BLOCK_H)
    norm_weight = tl.load(norm_weight_ptr + feature, mask=feature < k, other=0)
    norm_bias = tl.load(norm_bias_ptr + feature, mask=feature < k, other=0)
    whole_rows = ()
    for row in tl.static_range(ROWS):
        where = x_ptr + row * x_stride + whole
        x = tl.load(where, mask=whole < k, other=0, eviction_policy="evict_last")
        whole_rows = whole_rows + (x,)
    sums = scalars(sums_over(whole_rows, 0, ROWS), ROWS)
    squares = ()
    for row in tl.static_range(ROWS):
        centred = tl.where(whole < k, whole_rows[row] - sums[row] / k, 0.0)
        squares = squares + (centred * centred,)
    variances = scalars(sums_over(squares, 0, ROWS), ROWS)
    rows = ()
    for row in tl.static_range(ROWS):
        # The programs of a split multiply a part of what all of them normalise by.
        part = tl.load(x_ptr + row * x_stride + feature, mask=feature < k, other=0)
        scale = 1 / tl.sqrt(variances[row] / k + eps)
        # Zero beyond the features, where norm_weight and norm_bias are.
        normed = (part - sums[row] / k) * scale * norm_weight + norm_bias
        rows = rows + (by_place(normed, KIND),)

    walk(
        weights,
        ahead,
        rows,
        out_ptr,
        out_stride,
        partial_ptr,
        first_output,
        end_output,
        split,
        n,
        tiles,
        ROWS,
        KIND,
        BLOCK_N,
        BLOCK_K,
        GROUP,
        SPLIT_K,
        EVEN_K,
        VECTOR,
        HAS_BIAS,
        STAGES,
        False,
    )
    if SPLIT_K > 1:
        if arrived_last(arrivals_ptr + chunk, SPLIT_K):
            combine(
                weights,
                out_ptr,
                out_stride,
                partial_ptr,
                first_output,
                end_output,
                n,
                ROWS,
                KIND,
                SPLIT_K,
                HAS_BIAS,
                False,
            )


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: Weight,
    out: torch.Tensor,
    *,
    workspace: Workspace | None = None,
    tile: Tile | None = None,
) -> None:
    """out [T, N] = linear(layer_norm(x)), for T of 1 to 8.

    x            [T, K] float32, a row's features together
    norm_weight  [K] float32, and norm_bias
    weight       [N, K]: float16, INT8 or INT4, as `align_rows` gives it; bias of any float type
    out          [T, N] float16 or float32, a row's outputs together; rows may stand apart
    workspace    needed where the tile's split_k is above 1; without one, such a launch makes its
                 own, which a CUDA graph must not. `Workspace.for_weights` is enough for all
    tile         the tuning table's, if None

    The same as reference.layer_norm_linear, with the normed row in float32 instead of the compute
    dtype. Raises ValueError for a shape, dtype or layout that it does not take.
    """
    rows, k = x.shape
    arguments = weight_arguments(weight)
    _check(x, norm_weight, norm_bias, out, (arguments.n, arguments.k))
    tile = tile_for(KERNEL, x.device, rows, weight, tile)
    shared = workspace_for(x.device, rows, arguments.n, tile, workspace)
    grid = (tile.chunks(arguments.n) * tile.split_k,)
    _layer_norm_linear_kernel[grid](
        x,
        norm_weight,
        norm_bias,
        arguments.values,
        arguments.scale,
        x if arguments.bias is None else arguments.bias,
        out,
        x if shared is None else shared.partials,
        x if shared is None else shared.arrivals,
        eps,
        arguments.n,
        k,
        arguments.row_stride,
        arguments.scale_stride,
        x.stride(0),
        out.stride(0),
        tile.tiles_per_program,
        EXPONENT,
        **constexprs(arguments, rows, tile),
        BLOCK_H=triton.next_power_of_2(k),
        num_warps=tile.num_warps,
        num_stages=1,
    )


def _check(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    out: torch.Tensor,
    shape: tuple[int, int],
) -> None:
    n, k = shape
    if x.dtype != torch.float32 or x.shape[1] != k or x.stride(1) != 1:
        raise ValueError(f"x must be float32 [T, {k}], features together, not {described(x)}")
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector.dtype != torch.float32 or vector.shape != (k,) or vector.stride(0) != 1:
            raise ValueError(f"{name} must be float32 [{k}], not {described(vector)}")
    if out.dtype not in _OUT_DTYPES or out.shape != (x.shape[0], n) or out.stride(1) != 1:
        raise ValueError(
            f"out must be float16 or float32 [{x.shape[0]}, {n}], outputs together, not "
            f"{described(out)}"
        )


def compile_cases() -> tuple[CompileCase, ...]:
    """W_in of a block with 1 to 8 rows, and lm_head with one."""
    hidden, inner = GPT_J_6B.hidden_size, GPT_J_6B.inner_size
    pointers = {
        "x_ptr": "*fp32",
        "norm_weight_ptr": "*fp32",
        "norm_bias_ptr": "*fp32",
        "eps": "fp32",
    }
    more = {"BLOCK_H": hidden}
    # What a program reads beside weights: x for the statistics and again for its part, the norm.
    beside = 4 * 4 * hidden
    return (
        *cases_of_weight_pass(
            _layer_norm_linear_kernel,
            KERNEL,
            "w_in",
            (3 * hidden + inner, hidden),
            rows=(1, 2, 4, 8),
            pointers={**pointers, "out_ptr": "*fp16"},
            more=more,
            program_bytes=beside,
        ),
        *cases_of_weight_pass(
            _layer_norm_linear_kernel,
            KERNEL,
            "lm_head",
            (GPT_J_6B.vocab_size, hidden),
            rows=(1,),
            pointers={**pointers, "out_ptr": "*fp32"},
            more=more,
            program_bytes=beside,
        ),
    )
