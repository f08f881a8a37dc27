"""The weight formats that the kernels read, how they are made, and what they stand for.

Every weight is [N, K]: N output features, K input features, row-major, on any device. Kernels may
repack it for themselves; these are the formats that files and the other modules know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

INT4_GROUP = 128
"""Input features that share one scale in INT4."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """weight [N, K] float32, float16 or bfloat16; bias [N] float32 or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """quantized [N, K] int8 in [-127, 127], scale [N] float32; value = quantized * scale."""

    quantized: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.quantized.shape[0], self.quantized.shape[1]


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """packed [N, ceil(K / 2)] uint8, scale [N, ceil(K / group)] float16, group input features each.

    Byte j of a row holds feature 2j in its low and 2j + 1 in its high four bits, each as
    quantized + 8 with quantized in [-8, 7]; value = quantized * scale. An odd K leaves the last
    high nibble at 8, which is zero. The last group may be short.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    num_inputs: int
    group: int = INT4_GROUP
    bias: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.packed.shape[0], self.num_inputs


Weight: TypeAlias = DenseWeight | Int8Weight | Int4Weight


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block in the fused layout: two weight passes.

    norm_weight, norm_bias  [hidden] float32, the LayerNorm that attention and MLP share
    w_in   [3 * heads * head_dim + inner, hidden]: rows of q, k, v, then fc_in; its bias is fc_in's
           after zeros (None where the model has none)
    w_out  [hidden, heads * head_dim + inner]: columns of out_proj, then of fc_out
    """

    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    w_in: Weight
    w_out: Weight


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """What stands outside the blocks.

    embedding  [vocab, hidden] float32 or float16
    norm_weight, norm_bias  [hidden] float32, the final LayerNorm
    lm_head    [vocab, hidden]
    """

    embedding: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    lm_head: Weight


def quantize_int8(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weight:
    """Round weight [N, K] to nearest, one scale an output feature: max |row| / 127."""
    rows = weight.float()
    scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    quantized = (rows / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Weight(quantized, scale, bias)


def quantize_int4(
    weight: torch.Tensor, bias: torch.Tensor | None = None, group: int = INT4_GROUP
) -> Int4Weight:
    """Round weight [N, K] to nearest in groups of input features: scale = max |group| / 7.

    The scale is rounded to float16 first, so that the rounding of the weights makes up for it.
    """
    outputs, inputs = weight.shape
    rows = torch.nn.functional.pad(weight.float(), (0, -inputs % group))
    groups = rows.view(outputs, -1, group)
    smallest = torch.finfo(torch.float16).tiny
    scale = (groups.abs().amax(2) / 7).clamp_min(smallest).to(torch.float16)
    quantized = (groups / scale.float().unsqueeze(2)).round_().clamp_(-8, 7)
    levels = quantized.view(outputs, -1)[:, :inputs].to(torch.int8)
    return Int4Weight(pack_int4(levels), scale, inputs, group, bias)


def pack_int4(levels: torch.Tensor) -> torch.Tensor:
    """[N, K] integers in [-8, 7] to [N, ceil(K / 2)] uint8; see Int4Weight for the order."""
    nibbles = (levels + 8).to(torch.uint8)
    padded = torch.nn.functional.pad(nibbles, (0, levels.shape[1] % 2), value=8)
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor, num_inputs: int) -> torch.Tensor:
    """[N, ceil(K / 2)] uint8 to [N, K] int8 in [-8, 7]."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], -1)
    return nibbles[:, :num_inputs].to(torch.int8) - 8


def dequantize(weight: Weight) -> torch.Tensor:
    """The values that a weight stands for: [N, K] float32 (a dense one as it is, in float32)."""
    if isinstance(weight, DenseWeight):
        return weight.weight.float()
    if isinstance(weight, Int8Weight):
        return weight.quantized.float() * weight.scale.unsqueeze(1)
    levels = unpack_int4(weight.packed, weight.num_inputs).float()
    scales = weight.scale.float().repeat_interleave(weight.group, dim=1)[:, : weight.num_inputs]
    return levels * scales
