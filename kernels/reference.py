"""Every function of the forward pass in plain PyTorch: slow, on any device, and what kernels are
compared with.

T tokens in a pass, H hidden size, N outputs, K inputs. Activations are float32, or another
`compute dtype` on a device that has one; the residual stream [T, H] is always float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptjet.kernels.batch import BLOCK_SIZE
from gptjet.kernels.weights import DenseWeight, Int8Weight, Weight, unpack_int4

# Weights that are not of the compute dtype are converted this many elements at a time: 64 MiB.
_SCRATCH_ELEMENTS = 1 << 24
_ROTARY_BASE = 10000


class Scratch:
    """A buffer that weights are converted into, kept from one call to the next."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def take(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """[rows, columns] of the dtype and device of `like`, with whatever was in it."""
        needed = rows * columns
        held = self._buffer
        if (
            held is None
            or held.numel() < needed
            or held.dtype != like.dtype
            or held.device != like.device
        ):
            held = self._buffer = torch.empty(needed, dtype=like.dtype, device=like.device)
        return held[:needed].view(rows, columns)

    def release(self) -> None:
        """Give the buffer's memory back."""
        self._buffer = None

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return 0 if self._buffer is None else self._buffer.nbytes


def linear(x: torch.Tensor, weight: Weight, scratch: Scratch | None = None) -> torch.Tensor:
    """x [T, K] times the weight [N, K] transposed, plus its bias: [T, N] in x's dtype."""
    if isinstance(weight, DenseWeight) and weight.weight.dtype == x.dtype:
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return F.linear(x, weight.weight, bias)
    outputs, inputs = weight.shape
    scratch = scratch or Scratch()
    result = x.new_empty(x.shape[0], outputs)
    step = max(1, _SCRATCH_ELEMENTS // inputs)
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        rows = scratch.take(stop - start, inputs, x)
        dequantize_rows(weight, start, stop, rows)
        torch.matmul(x, rows.T, out=result[:, start:stop])
    if weight.bias is not None:
        result += weight.bias
    return result


def dequantize_rows(weight: Weight, start: int, stop: int, out: torch.Tensor) -> None:
    """Write the values of rows [start, stop) into out [stop - start, K], in out's dtype."""
    if isinstance(weight, DenseWeight):
        out.copy_(weight.weight[start:stop])
        return
    if isinstance(weight, Int8Weight):
        out.copy_(weight.quantized[start:stop])
        out *= weight.scale[start:stop].unsqueeze(1)
        return
    out.copy_(unpack_int4(weight.packed[start:stop], weight.num_inputs))
    scale = weight.scale[start:stop].to(out.dtype)
    if weight.num_inputs % weight.group == 0:
        groups = out.view(stop - start, -1, weight.group)
        groups *= scale.unsqueeze(2)
    else:
        out *= scale.repeat_interleave(weight.group, dim=1)[:, : weight.num_inputs]


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm of x [T, H] float32: (x - mean) / sqrt(variance + eps) * weight + bias."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: Weight,
    *,
    compute_dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """linear(layer_norm(x)): [T, N] in the compute dtype. x [T, H] float32.

    The first weight pass of a block, and with the final LayerNorm and `lm_head` its logits.
    """
    normed = layer_norm(x, norm_weight, norm_bias, eps)
    return linear(normed.to(compute_dtype), weight, scratch)


def rotary_tables(
    max_context: int, rotary_dim: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [max_context, rotary_dim / 2] float32 of position * 10000^(-2i / rotary_dim).

    Su et al. 2021, with GPT-J's base; computed as transformers computes them, to the last bit.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64) / max(rotary_dim, 1)
    frequencies = 1.0 / (_ROTARY_BASE**exponents)
    angles = torch.arange(max_context, dtype=torch.int64).float()[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the leading features of each head of x [T, heads, head_dim] by its token's angles.

    cos, sin [T, rotary_dim / 2] float32. Features 2i and 2i + 1 are one pair (GPT-J's interleaved
    layout); features from rotary_dim on stay as they are. A new tensor, in x's dtype.
    """
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim == 0:
        return x.clone()
    even, odd = x[..., 0:rotary_dim:2].float(), x[..., 1:rotary_dim:2].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def slot_mapping(
    positions: torch.Tensor, sequence_index: torch.Tensor, block_tables: torch.Tensor
) -> torch.Tensor:
    """The slot [T] int64 of each token: block * BLOCK_SIZE + offset. For fields of ForwardBatch."""
    positions = positions.long()
    blocks = block_tables[sequence_index.long(), positions // BLOCK_SIZE].long()
    return blocks * BLOCK_SIZE + positions % BLOCK_SIZE


def write_kv(
    layer_cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Put keys and values [T, heads, head_dim] into their slots [T] of one layer's KV cache.

    layer_cache [2, num_blocks, heads, BLOCK_SIZE, head_dim], any float dtype; or int8 with
    INT8_KV_ROWS rows, which they are quantised for.
    """
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    for held, given in zip(layer_cache, (keys, values), strict=True):
        if layer_cache.dtype == torch.int8:
            levels, scales = quantize_kv(given)
            held[blocks, :, offsets] = levels
            int8_kv_scales(held)[blocks, :, offsets] = scales
        else:
            held[blocks, :, offsets] = given.to(layer_cache.dtype)


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, heads, head_dim] as int8 levels of its shape and a float32 scale [T, heads].

    scale = max |x| / 127 of a token's head; rounded to nearest, ties to even. Where x holds NaN or
    infinity the scale is infinite and every level 0: what is read back is NaN, and is noticed.
    """
    floats = x.float()
    largest = floats.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(-1)
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    levels = (floats / scale.unsqueeze(-1)).round_().clamp_(-127, 127)
    levels = torch.where(scale.isfinite().unsqueeze(-1), levels, 0)
    return levels.to(torch.int8), scale


def int8_kv_scales(cache: torch.Tensor) -> torch.Tensor:
    """The scales [..., BLOCK_SIZE] float32 inside an INT8 cache [..., INT8_KV_ROWS, head_dim].

    A view: what is written to it is in the cache.
    """
    return cache[..., BLOCK_SIZE, : 4 * BLOCK_SIZE].view(torch.float32)


def paged_attention(
    queries: torch.Tensor,
    layer_cache: torch.Tensor,
    positions: torch.Tensor,
    sequence_index: torch.Tensor,
    block_tables: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of queries [T, heads, head_dim] to the slots of their own sequences.

    Each attends to positions 0 to its own, scores divided by sqrt(head_dim). positions,
    sequence_index [T] and block_tables are ForwardBatch's. [T, heads * head_dim] in queries' dtype.
    layer_cache as in `write_kv`.
    """
    tokens, heads, head_dim = queries.shape
    result = torch.empty_like(queries)
    rows, counts = torch.unique_consecutive(sequence_index, return_counts=True)
    start = 0
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        own = positions[start : start + count].long()
        context = int(own.max()) + 1
        blocks = block_tables[row, : -(-context // BLOCK_SIZE)].long()
        keys, values = _gather_kv(layer_cache[:, blocks], context, queries.dtype)
        mask = None
        if count > 1:
            mask = own[:, None] >= torch.arange(context, device=own.device)
        attended = F.scaled_dot_product_attention(
            queries[start : start + count].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
        )
        result[start : start + count] = attended[0].transpose(0, 1)
        start += count
    return result.reshape(tokens, heads * head_dim)


def _gather_kv(held: torch.Tensor, context: int, dtype: torch.dtype) -> torch.Tensor:
    """[2, blocks, heads, rows, head_dim] of a sequence as [2, heads, context, head_dim]."""
    _, _, heads, _, head_dim = held.shape
    if held.dtype == torch.int8:
        # In float32: the scale of a token may be beyond float16 where its values are not.
        values = held[..., :BLOCK_SIZE, :].float() * int8_kv_scales(held).unsqueeze(-1)
    else:
        values = held
    rows = values.transpose(1, 2).reshape(2, heads, -1, head_dim)
    return rows[:, :, :context].to(dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's "gelu_new": 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return F.gelu(x, approximate="tanh")


def gelu_linear_residual(
    residual: torch.Tensor,
    attended: torch.Tensor,
    inner: torch.Tensor,
    weight: Weight,
    *,
    scratch: Scratch | None = None,
) -> None:
    """residual [T, H] float32 += linear([attended; gelu(inner)]), in place.

    The second weight pass of a block: attended [T, heads * head_dim], inner [T, inner_size].
    """
    residual += linear(torch.cat((attended, gelu(inner)), dim=1), weight, scratch)
