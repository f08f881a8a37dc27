"""gelu and the second weight pass of a block, added to the residual stream, for 1 to 8 rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase
from gptjet.kernels.gpu.gemv import arrived_last, by_place, combine, load_tile, walk
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

KERNEL = "gelu_linear_residual"


@triton.jit
def _gelu(x):
    """0.5 x (1 + tanh(y)) with y = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 y).

    There is no tanh instruction on sm_70. For a large negative y the exponential is infinite and
    the result the zero that it should be.
    """
    return x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def _gelu_linear_residual_kernel(
    residual_ptr,
    attended_ptr,
    inner_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    partial_ptr,
    arrivals_ptr,
    n,
    k,
    width,
    row_stride,
    scale_stride,
    residual_stride,
    attended_stride,
    inner_stride,
    tiles,
    exponent,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    is_inner = (feature >= width) & (feature < k)
    rows = ()
    for row in tl.static_range(ROWS):
        attended = tl.load(
            attended_ptr + row * attended_stride + feature,
            mask=feature < width,
            other=0,
            eviction_policy="evict_last",
        )
        inner = tl.load(
            inner_ptr + row * inner_stride + feature - width,
            mask=is_inner,
            other=0,
            eviction_policy="evict_last",
        )
        # Each is zero where the other one is not, and gelu(0) is 0.
        both = attended.to(tl.float32) + _gelu(inner.to(tl.float32))
        rows = rows + (by_place(both, KIND),)

    walk(
        weights,
        ahead,
        rows,
        residual_ptr,
        residual_stride,
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
        True,
    )
    if SPLIT_K > 1:
        if arrived_last(arrivals_ptr + chunk, SPLIT_K):
            combine(
                weights,
                residual_ptr,
                residual_stride,
                partial_ptr,
                first_output,
                end_output,
                n,
                ROWS,
                KIND,
                SPLIT_K,
                HAS_BIAS,
                True,
            )


def gelu_linear_residual(
    residual: torch.Tensor,
    attended: torch.Tensor,
    inner: torch.Tensor,
    weight: Weight,
    *,
    workspace: Workspace | None = None,
    tile: Tile | None = None,
) -> None:
    """residual [T, N] float32 += linear([attended; gelu(inner)]) in place, for T of 1 to 8.

    attended   [T, W] float16, and inner [T, I] float16: a row's features together, rows may stand
               apart (inner is a view of the first pass's outputs)
    weight     [N, W + I]: float16, INT8 or INT4, as `align_rows` gives it; bias of any float type
    workspace  needed where the tile's split_k is above 1; without one, such a launch makes its own,
               which a CUDA graph must not. `Workspace.for_weights` is enough for all
    tile       the tuning table's, if None

    The same as reference.gelu_linear_residual, with gelu(inner) in float32 instead of float16.
    Raises ValueError for a shape, dtype or layout that it does not take.
    """
    rows, width = attended.shape
    arguments = weight_arguments(weight)
    _check(residual, attended, inner, (arguments.n, arguments.k))
    tile = tile_for(KERNEL, residual.device, rows, weight, tile)
    shared = workspace_for(residual.device, rows, arguments.n, tile, workspace)
    grid = (tile.chunks(arguments.n) * tile.split_k,)
    _gelu_linear_residual_kernel[grid](
        residual,
        attended,
        inner,
        arguments.values,
        arguments.scale,
        residual if arguments.bias is None else arguments.bias,
        residual if shared is None else shared.partials,
        residual if shared is None else shared.arrivals,
        arguments.n,
        arguments.k,
        width,
        arguments.row_stride,
        arguments.scale_stride,
        residual.stride(0),
        attended.stride(0),
        inner.stride(0),
        tile.tiles_per_program,
        EXPONENT,
        **constexprs(arguments, rows, tile),
        num_warps=tile.num_warps,
        num_stages=1,
    )


def _check(
    residual: torch.Tensor,
    attended: torch.Tensor,
    inner: torch.Tensor,
    shape: tuple[int, int],
) -> None:
    n, k = shape
    rows = residual.shape[0]
    if residual.dtype != torch.float32 or residual.shape[1] != n or residual.stride(1) != 1:
        raise ValueError(f"residual must be float32 [T, {n}], not {described(residual)}")
    for name, part in (("attended", attended), ("inner", inner)):
        if part.dtype != torch.float16 or part.shape[0] != rows or part.stride(1) != 1:
            raise ValueError(f"{name} must be float16 [{rows}, ...], not {described(part)}")
    if attended.shape[1] + inner.shape[1] != k:
        raise ValueError(
            f"attended and inner must have {k} features together, not "
            f"{attended.shape[1]} + {inner.shape[1]}"
        )


def compile_cases() -> tuple[CompileCase, ...]:
    """W_out of a block with 1 to 8 rows."""
    hidden, inner = GPT_J_6B.hidden_size, GPT_J_6B.inner_size
    return cases_of_weight_pass(
        _gelu_linear_residual_kernel,
        KERNEL,
        "w_out",
        (hidden, hidden + inner),
        rows=(1, 2, 4, 8),
        pointers={"residual_ptr": "*fp32", "attended_ptr": "*fp16", "inner_ptr": "*fp16"},
        more={},
        program_bytes=0,
        # Each program reads its own part of both in float16; the residual is read and written.
        feature_bytes=2,
        out_bytes=8,
    )
