"""INT8 and INT4 weights as float16, a tile of rows at a time, for products that cuBLAS computes.

One read of the quantised bytes and one write of the values: what plain tensor operations need ten
passes over memory for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from gptjet.kernels.gpu.compile_case import GPT_J_6B, CompileCase
from gptjet.kernels.weights import INT4_GROUP, Int4Weight, Int8Weight

if TYPE_CHECKING:
    import torch

_BLOCK = 2048
_NUM_WARPS = 4


def dequantize_rows(
    weight: Int8Weight | Int4Weight, start: int, stop: int, out: torch.Tensor
) -> None:
    """Write the values of rows [start, stop) into out [stop - start, K] float16, contiguous.

    Rows of the weight may stand apart.

    Each is quantised * scale, computed in float32 and rounded once. Nothing is allocated or waited
    for.
    """
    inputs = weight.shape[1]
    grid = (stop - start, triton.cdiv(inputs, _BLOCK))
    if isinstance(weight, Int8Weight):
        _dequantize_int8_kernel[grid](
            weight.quantized[start:stop],
            weight.scale[start:stop],
            out,
            inputs,
            weight.quantized.stride(0),
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
        return
    _dequantize_int4_kernel[grid](
        weight.packed[start:stop],
        weight.scale[start:stop],
        out,
        inputs,
        weight.packed.stride(0),
        weight.scale.stride(0),
        GROUP=weight.group,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )


@triton.jit
def _dequantize_int8_kernel(quantized, scale, out, inputs, row_bytes, BLOCK: tl.constexpr):
    """Program (row, block of inputs)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < inputs
    levels = tl.load(quantized + row * row_bytes + column, mask=held, other=0)
    values = levels.to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * inputs + column, values.to(tl.float16), mask=held)


@triton.jit
def _dequantize_int4_kernel(
    packed, scale, out, inputs, row_bytes, row_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row, block of inputs). A byte is read for each of its two, from the cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < inputs
    both = tl.load(packed + row * row_bytes + column // 2, mask=held, other=0).to(tl.int32)
    levels = ((both >> ((column & 1) * 4)) & 15) - 8
    scales = tl.load(scale + row * row_groups + column // GROUP, mask=held, other=0.0)
    values = levels.to(tl.float32) * scales.to(tl.float32)
    tl.store(out + row * inputs + column, values.to(tl.float16), mask=held)


def compile_cases() -> tuple[CompileCase, ...]:
    """A tile of GPT-J-6B's w_in, 32 MiB of values."""
    inputs = GPT_J_6B.hidden_size
    rows = (16 << 20) // inputs
    common = {"out": "*fp16", "inputs": "i32"}
    eight = rows * inputs * 3 + rows * 4
    four = rows * inputs * 5 // 2 + rows * (inputs // INT4_GROUP) * 2
    programs = rows * triton.cdiv(inputs, _BLOCK)
    return (
        CompileCase(
            name="int8",
            kernel=_dequantize_int8_kernel,
            signature={
                "quantized": "*i8",
                "scale": "*fp32",
                **common,
                "row_bytes": "i32",
                "BLOCK": "constexpr",
            },
            constexprs={"BLOCK": _BLOCK},
            num_warps=_NUM_WARPS,
            programs=programs,
            bytes_moved=eight,
            bytes_minimum=eight,
            divisible_by_16=frozenset({"inputs", "row_bytes"}),
        ),
        CompileCase(
            name="int4",
            kernel=_dequantize_int4_kernel,
            signature={
                "packed": "*u8",
                "scale": "*fp16",
                **common,
                "row_bytes": "i32",
                "row_groups": "i32",
                "GROUP": "constexpr",
                "BLOCK": "constexpr",
            },
            constexprs={"GROUP": INT4_GROUP, "BLOCK": _BLOCK},
            num_warps=_NUM_WARPS,
            programs=programs,
            bytes_moved=four,
            bytes_minimum=four,
            divisible_by_16=frozenset({"inputs", "row_bytes", "row_groups"}),
        ),
    )
