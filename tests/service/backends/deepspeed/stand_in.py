"""A CPU stand-in for DeepSpeed's compiled `transformer_inference` op, for tests only.

Installed as `BaseOp.inference_module`, it lets the very graph that DeepSpeed injects run here. It
is written from what the CUDA sources compute (pt_binding.cpp, softmax.cu, transform.cu, gelu.cu,
inference_context.h of DeepSpeed 0.19.8), including what is odd about them: one workspace and one
token counter for the process, a prompt recognised by its length, local attention one token short in
a decode step. DeepSpeed's own `*_fallback` functions rotate nothing for GPT-J and prove nothing.

It raises `DeviceMemoryError` where CUDA would read or write outside the workspace, and poisons with
NaN what CUDA leaves undefined, so that tests of our own guards mean something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_MASKED = -10000.0  # minus_infinity in softmax.cu


class DeviceMemoryError(Exception):
    """CUDA would have touched memory that is not the workspace's, without a word."""


@dataclass
class _Workspace:
    """What GenWorkSpace lays out: keys and values [layers, B, heads, max_tokens, head_dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    batch_size: int
    max_tokens: int


class StandInOp:
    """The op's functions under their own names, in FP32 and (rounding as CUDA does) in FP16.

    Counters a test may read: `allocations`, `resets`, `prompts`, `decode_steps`.
    """

    def __init__(self) -> None:
        self.workspace: _Workspace | None = None
        self._released: _Workspace | None = None
        self.num_tokens = 0
        self.allocations = 0
        self.resets = 0
        self.prompts = 0
        self.decode_steps = 0
        for suffix, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
            setattr(self, f"qkv_gemm_{suffix}", self._qkv_gemm)
            setattr(self, f"softmax_context_{suffix}", self._softmax_context)
            setattr(self, f"vector_matmul_{suffix}", self._vector_matmul)
            setattr(self, f"fused_gemm_gelu_{suffix}", self._fused_gemm_gelu)
            setattr(self, f"mlp_gemm_{suffix}", self._mlp_gemm)
            setattr(self, f"residual_add_bias_{suffix}", self._residual_add_bias)
            setattr(self, f"allocate_workspace_{suffix}", self._allocator(dtype))

    # -- workspace ----------------------------------------------------------------------------

    def _allocator(self, dtype: torch.dtype) -> Any:
        def allocate_workspace(
            hidden_dim: int,
            num_heads: int,
            prompt_length: int,
            batch_size: int,
            num_layers: int,
            mp_size: int,
            external_cache: bool,
            rank: int,
            max_out_tokens: int,
            min_out_tokens: int,
        ) -> None:
            shape = (
                num_layers,
                batch_size,
                num_heads // mp_size,
                max_out_tokens,
                hidden_dim // num_heads,
            )
            self.workspace = _Workspace(
                keys=torch.full(shape, math.nan, dtype=dtype),
                values=torch.full(shape, math.nan, dtype=dtype),
                batch_size=batch_size,
                max_tokens=max_out_tokens,
            )
            self.allocations += 1

        return allocate_workspace

    def reset_cache(self) -> None:
        """The counter goes back to one; stale keys are poisoned so that no test reads them."""
        self.num_tokens = 1
        self.resets += 1
        self._poison()

    def release_workspace(self) -> None:
        """cudaFree, and a null pointer from here on."""
        self._released, self.workspace = self.workspace, None

    def retake_workspace(self) -> bool:
        """cudaMalloc of the old size: what was in it is gone."""
        if self.workspace is None and self._released is not None:
            self.workspace, self._released = self._released, None
            self._poison()
        return self.workspace is not None

    @torch.inference_mode()
    def _poison(self) -> None:
        if self.workspace is not None:
            self.workspace.keys.fill_(math.nan)
            self.workspace.values.fill_(math.nan)

    def _checked_workspace(self, batch_size: int) -> _Workspace:
        if self.workspace is None:
            raise DeviceMemoryError("null pointer: the workspace was released and not retaken")
        if batch_size > self.workspace.batch_size:
            raise DeviceMemoryError(
                f"batch {batch_size} writes past a workspace made for {self.workspace.batch_size}"
            )
        return self.workspace

    # -- the layer ----------------------------------------------------------------------------

    def _qkv_gemm(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        epsilon: float,
        add_bias: bool,
        int8: bool,
        transposed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._checked_workspace(hidden.shape[0])
        normed = _layer_norm(hidden, gamma, beta, epsilon)
        qkv = normed @ weight
        return (qkv + bias if add_bias else qkv), normed

    def _softmax_context(
        self,
        qkv: torch.Tensor,
        mask: torch.Tensor,
        rotary_dim: int,
        rotate_half: bool,
        rotate_every_two: bool,
        heads: int,
        num_kv: int,
        norm_factor: float,
        triangular: bool,
        local_attention: bool,
        window_size: int,
        no_masking: bool,
        layer_id: int,
        num_layers: int,
        alibi: torch.Tensor,
        rope_theta: float,
        is_prompt: bool,
        token_idx: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, new, _ = qkv.shape
        workspace = self._checked_workspace(batch)
        if new > 1:  # an input longer than one token is a prompt, whatever the caller says
            self.num_tokens = new
            self.prompts += layer_id == 0
        else:
            self.decode_steps += layer_id == 0
        total = self.num_tokens
        if total > workspace.max_tokens or total < 1:
            raise DeviceMemoryError(f"token {total} of a workspace of {workspace.max_tokens}")
        # [B, new, 3 * heads * d] -> three of [B, heads, new, d]
        query, key, value = qkv.view(batch, new, 3, heads, -1).permute(2, 0, 3, 1, 4)
        first = 0 if new > 1 else total - 1
        if rotary_dim is not None and rotary_dim > 0 and rotate_every_two:
            query = self.rotate(query, first, rotary_dim, rope_theta)
            key = self.rotate(key, first, rotary_dim, rope_theta)
        keys, values = workspace.keys[layer_id], workspace.values[layer_id]
        keys[:batch, :, first : first + new] = key
        values[:batch, :, first : first + new] = value
        keys, values = keys[:batch, :, :total], values[:batch, :, :total]

        alpha = norm_factor * norm_factor
        scores = (query.float() @ keys.float().transpose(-1, -2) * alpha).to(qkv.dtype).float()
        if mask.dim() > 1:
            if mask.shape[-1] != total:
                raise DeviceMemoryError(
                    f"a mask of width {mask.shape[-1]} read at {total} entries a row"
                )
            scores = scores + mask.view(batch, 1, -1, total).float()
        visible = _visible(new, total, triangular and new > 1, local_attention, window_size)
        scores = scores.masked_fill(~visible, _MASKED)
        exp = torch.exp(scores - scores.amax(-1, keepdim=True))
        probabilities = (exp / (exp.sum(-1, keepdim=True) + 1e-6)).to(qkv.dtype)
        context = (probabilities @ values).transpose(1, 2).reshape(batch, new, -1)
        if layer_id == num_layers - 1:
            self.num_tokens += 1
        return context, keys, values

    def rotate(
        self, x: torch.Tensor, first_position: int, rotary_dim: int, theta: float
    ) -> torch.Tensor:
        """Interleaved ("rotate every two") rotary embedding of x: [B, heads, new, d]."""
        even = torch.arange(0, rotary_dim, 2, dtype=torch.float32)
        positions = torch.arange(first_position, first_position + x.shape[2], dtype=torch.float32)
        angles = positions[:, None] / theta ** (even / rotary_dim)
        sin, cos = angles.sin(), angles.cos()
        rotated = x.float().clone()
        a, b = x[..., 0:rotary_dim:2].float(), x[..., 1:rotary_dim:2].float()
        rotated[..., 0:rotary_dim:2] = a * cos - b * sin
        rotated[..., 1:rotary_dim:2] = b * cos + a * sin
        return rotated.to(x.dtype)

    def _vector_matmul(
        self,
        context: torch.Tensor,
        weight: torch.Tensor,
        async_op: bool,
        scale: torch.Tensor,
        int8: bool,
        transposed: bool,
    ) -> torch.Tensor:
        return context @ weight

    def _fused_gemm_gelu(
        self,
        normed: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        weight_out: torch.Tensor,
        scale_out: torch.Tensor,
        int8: bool,
        transposed: bool,
    ) -> torch.Tensor:
        return _bias_gelu(normed @ weight, bias) @ weight_out

    def _mlp_gemm(
        self,
        attention: torch.Tensor,
        residual: torch.Tensor,
        attention_bias: torch.Tensor,
        weight: torch.Tensor,
        weight_out: torch.Tensor,
        bias: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        epsilon: float,
        pre_layer_norm: bool,
        mlp_after_attn: bool,
        scale: torch.Tensor,
        scale_out: torch.Tensor,
        int8: bool,
        activation: Any,
        transposed: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = attention.float() + residual.float() + attention_bias.float()
        normed = _layer_norm(x, gamma, beta, epsilon).to(attention.dtype)
        return _bias_gelu(normed @ weight, bias) @ weight_out, normed

    def _residual_add_bias(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        attention: torch.Tensor,
        attention_bias: torch.Tensor,
        final_bias: torch.Tensor,
        mp_size: int,
        mlp_after_attn: bool,
        add_bias: bool,
        pre_layer_norm: bool,
    ) -> torch.Tensor:
        if mlp_after_attn:
            total = residual.float() + attention.float() + final_bias.float()
            result = (total + attention_bias.float()) / mp_size + hidden.float()
        else:
            total = residual.float() + final_bias.float()
            if add_bias:
                total = total + attention_bias.float()
            result = total / mp_size + attention.float() + hidden.float()
        residual.copy_(result)  # in place, as on the card: the block's input is gone
        return residual


class WrongRotaryOp(StandInOp):
    """A planted fault: rotates pairs half a head apart, as LLaMA does, with GPT-J's weights."""

    def rotate(
        self, x: torch.Tensor, first_position: int, rotary_dim: int, theta: float
    ) -> torch.Tensor:
        half = rotary_dim // 2
        mixed = x.clone()
        mixed[..., 0:rotary_dim:2], mixed[..., 1:rotary_dim:2] = (
            x[..., :half],
            x[..., half:rotary_dim],
        )
        turned = super().rotate(mixed, first_position, rotary_dim, theta)
        result = turned.clone()
        result[..., :half] = turned[..., 0:rotary_dim:2]
        result[..., half:rotary_dim] = turned[..., 1:rotary_dim:2]
        return result


def _layer_norm(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, epsilon: float
) -> torch.Tensor:
    normed = F.layer_norm(x.float(), (x.shape[-1],), gamma.float(), beta.float(), epsilon)
    return normed.to(x.dtype)


def _bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x.float() + bias.float(), approximate="tanh").to(x.dtype)


def _visible(
    new: int, total: int, triangular: bool, local_attention: bool, window_size: int
) -> torch.Tensor:
    """[new, total] bool: which key a row sees, by softmax.cu's arithmetic.

    In a decode step the row's number is taken to be `total`, one more than it is, so a local layer
    sees one key less than in a prompt.
    """
    rows = torch.arange(new)[:, None]
    columns = torch.arange(total)[None, :]
    seen = columns <= rows if triangular else torch.ones(new, total, dtype=torch.bool)
    if local_attention:
        row_number = rows + (0 if new == total else total)
        seen = seen & ((columns > row_number - window_size) | (row_number < window_size))
    return seen
