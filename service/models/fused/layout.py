"""Putting stored matrices together into one weight pass, in the wanted format, with little memory.

Whatever the format, no more than a slice of the result exists in float32 beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch

from gptjet.kernels.weights import (
    INT4_GROUP,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    Weight,
    quantize_int4,
    quantize_int8,
)
from gptjet.service.engine.errors import BackendLoadError

WeightType: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4"]
WEIGHT_TYPES: tuple[WeightType, ...] = get_args(WeightType)

DENSE_DTYPES: dict[WeightType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_SLICE_ELEMENTS = 1 << 20  # 4 MiB of float32


def build_weight(
    parts: Sequence[torch.Tensor],
    dim: int,
    weight_type: WeightType,
    *,
    bias: torch.Tensor | None,
    name: str,
) -> Weight:
    """The parts side by side along `dim` (0: their rows, 1: their columns) as `weight_type`.

    One part that is of the type already is taken as it is.
    INT8 and INT4 are rounded to nearest. Raises BackendLoadError with `name` where a value cannot
    be held: not finite, or beyond float16.
    """
    inputs = parts[0].shape[1] if dim == 0 else sum(part.shape[1] for part in parts)
    outputs = sum(part.shape[0] for part in parts) if dim == 0 else parts[0].shape[0]
    dtype = DENSE_DTYPES.get(weight_type)
    if dtype is not None:
        if len(parts) == 1 and parts[0].dtype is dtype and parts[0].is_contiguous():
            check_finite(parts[0], name, dtype)
            return DenseWeight(parts[0], bias)
        dense = torch.empty(outputs, inputs, dtype=dtype)
        start = 0
        for part in parts:
            target = dense.narrow(dim, start, part.shape[dim])
            target.copy_(part)
            start += part.shape[dim]
        check_finite(dense, name, parts[0].dtype)  # as a whole: some columns would be copied
        return DenseWeight(dense, bias)
    slices = _float_slices(parts, dim)
    if weight_type == "int8":
        return _build_int8(slices, outputs, inputs, bias, name)
    return _build_int4(slices, outputs, inputs, bias, name)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite. Without a copy, which torch.isfinite would make."""
    lowest, highest = tensor.aminmax()  # NaN where any is
    return bool(lowest.isfinite() & highest.isfinite())


def check_finite(tensor: torch.Tensor, name: str, stored: torch.dtype) -> None:
    """Refuse NaN and infinity: a stored one, or what became of a value beyond the dtype.

    Raises BackendLoadError with `name`.
    """
    if is_finite(tensor):
        return
    narrower = tensor.dtype is torch.float16 and stored is not torch.float16
    raise BackendLoadError(
        f"{name} holds a value that is not finite"
        + (" in float16 (beyond 65504): use another dtype" if narrower else "")
    )


def _float_slices(parts: Sequence[torch.Tensor], dim: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows in float32) of the parts side by side, in order."""
    if dim == 0:
        start = 0
        for part in parts:
            for offset, rows in _float_slices([part], 1):
                yield start + offset, rows
            start += part.shape[0]
        return
    step = max(1, _SLICE_ELEMENTS // sum(part.shape[1] for part in parts))
    for start in range(0, parts[0].shape[0], step):
        yield start, torch.cat([part[start : start + step].float() for part in parts], dim=1)


def _build_int8(
    slices: Iterator[tuple[int, torch.Tensor]],
    outputs: int,
    inputs: int,
    bias: torch.Tensor | None,
    name: str,
) -> Int8Weight:
    quantized = torch.empty(outputs, inputs, dtype=torch.int8)
    scale = torch.empty(outputs)
    for start, rows in slices:
        piece = quantize_int8(rows)
        quantized[start : start + len(rows)] = piece.quantized
        scale[start : start + len(rows)] = piece.scale
    check_finite(scale, name, scale.dtype)
    return Int8Weight(quantized, scale, bias)


def _build_int4(
    slices: Iterator[tuple[int, torch.Tensor]],
    outputs: int,
    inputs: int,
    bias: torch.Tensor | None,
    name: str,
) -> Int4Weight:
    packed = torch.empty(outputs, -(-inputs // 2), dtype=torch.uint8)
    scale = torch.empty(outputs, -(-inputs // INT4_GROUP), dtype=torch.float16)
    for start, rows in slices:
        piece = quantize_int4(rows)
        packed[start : start + len(rows)] = piece.packed
        scale[start : start + len(rows)] = piece.scale
    check_finite(scale, name, torch.float32)
    return Int4Weight(packed, scale, inputs, INT4_GROUP, bias)
