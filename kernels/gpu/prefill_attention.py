"""Causal attention of a prompt's tokens to a paged KV cache: SDPA over each sequence's gathered KV.

torch picks its kernel (flash from sm_80 on, memory-efficient on sm_70 and sm_75), and both know a
causal bias that ends at the lower right: so a chunk in the middle of a prompt needs no mask of
[T, context] either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from gptjet.kernels.batch import BLOCK_SIZE, ForwardBatch
from gptjet.kernels.reference import int8_kv_scales


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [first, last) of a pass that stand together in one sequence, from position `start`.

    blocks  [ceil(context / BLOCK_SIZE)] int32 on the device, the sequence's KV blocks
    """

    first: int
    last: int
    start: int
    blocks: torch.Tensor

    @property
    def context(self) -> int:
        """Tokens of the sequence up to and with the last one here."""
        return self.start + self.last - self.first


def spans_of(batch: ForwardBatch, block_tables: torch.Tensor) -> list[Span]:
    """The spans of a batch, read on the host; `block_tables` are the device's."""
    index = batch.sequence_index.numpy()
    firsts = [0, *(np.flatnonzero(index[1:] != index[:-1]) + 1).tolist()]
    lasts = [*firsts[1:], len(index)]
    starts = batch.positions.numpy()[firsts].tolist()
    spans = []
    for first, last, start in zip(firsts, lasts, starts, strict=True):
        num_blocks = -(-(start + last - first) // BLOCK_SIZE)
        spans.append(Span(first, last, start, block_tables[int(index[first]), :num_blocks]))
    return spans


def prefill_attention(
    queries: torch.Tensor, layer_cache: torch.Tensor, spans: Sequence[Span], out: torch.Tensor
) -> None:
    """Write the attention of queries [T, heads, head_dim] into out [T, heads * head_dim].

    Token p of a span attends to positions 0 to its own, scores divided by sqrt(head_dim).
    layer_cache: one layer's, float16 or INT8 with its scales; it holds the spans' own tokens.
    """
    tokens, heads, head_dim = queries.shape
    result = out.view(tokens, heads, head_dim)
    for span in spans:
        keys, values = gather_kv(layer_cache, span.blocks, span.context, queries.dtype)
        count = span.last - span.first
        bias = None
        if 1 < count < span.context:
            bias = causal_lower_right(count, span.context)
        attended = F.scaled_dot_product_attention(
            queries[span.first : span.last].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=bias,
            is_causal=1 < count == span.context,
        )
        result[span.first : span.last] = attended[0].transpose(0, 1)


def gather_kv(
    layer_cache: torch.Tensor, blocks: torch.Tensor, context: int, dtype: torch.dtype
) -> torch.Tensor:
    """Keys and values [2, heads, context, head_dim] of one sequence, in one copy out of its blocks.

    blocks [ceil(context / BLOCK_SIZE)] int32. Values of an INT8 cache are multiplied out.
    """
    held = layer_cache.permute(0, 2, 1, 3, 4).index_select(2, blocks)
    if held.dtype == torch.int8:
        # In float32: the scale of a token may be beyond float16 where its values are not.
        scales = int8_kv_scales(held).unsqueeze(-1)
        held = (held[..., :BLOCK_SIZE, :] * scales).to(dtype)
    return held.flatten(2, 3)[:, :, :context].to(dtype)
