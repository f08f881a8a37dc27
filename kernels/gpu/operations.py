"""The functions that a GPU model is made of, by name: Triton's kernels, or plain PyTorch in place.

The PyTorch ones have the same signatures and write into the same buffers, so that everything around
the kernels (buckets, padding, graphs, routes) can be tested without them, in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gptjet.kernels import reference
from gptjet.kernels.gpu.gemv_launch import Workspace
from gptjet.kernels.weights import Int4Weight, Int8Weight, Weight


class Embed(Protocol):
    """See embedding.embed."""

    def __call__(
        self,
        token_ids: torch.Tensor,
        sources: torch.Tensor,
        sampled: torch.Tensor,
        embedding: torch.Tensor,
        residual: torch.Tensor,
    ) -> None:
        """See the class."""
        ...


class LayerNormLinear(Protocol):
    """out [T, N] = linear(layer_norm(x [T, H] float32)), T at most 8."""

    def __call__(
        self,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weight: Weight,
        out: torch.Tensor,
        *,
        workspace: Workspace | None = None,
    ) -> None:
        """See the class."""
        ...


class GeluLinearResidual(Protocol):
    """residual [T, H] float32 += linear([attended; gelu(inner)]), T at most 8."""

    def __call__(
        self,
        residual: torch.Tensor,
        attended: torch.Tensor,
        inner: torch.Tensor,
        weight: Weight,
        *,
        workspace: Workspace | None = None,
    ) -> None:
        """See the class."""
        ...


class RotaryWriteKv(Protocol):
    """See rotary_kv.rotary_write_kv; any number of tokens."""

    def __call__(
        self,
        projected: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        sequence_index: torch.Tensor,
        block_tables: torch.Tensor,
        layer_cache: torch.Tensor,
        queries: torch.Tensor,
    ) -> None:
        """See the class."""
        ...


class PagedAttention(Protocol):
    """out [T, heads * head_dim] of one query token a row; zeros in padding rows."""

    def __call__(
        self,
        queries: torch.Tensor,
        layer_cache: torch.Tensor,
        positions: torch.Tensor,
        sequence_index: torch.Tensor,
        block_tables: torch.Tensor,
        out: torch.Tensor,
        *,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See the class."""
        ...


class DequantizeRows(Protocol):
    """See dequantize.dequantize_rows."""

    def __call__(
        self, weight: Int8Weight | Int4Weight, start: int, stop: int, out: torch.Tensor
    ) -> None:
        """See the class."""
        ...


class DotLinear(Protocol):
    """See dot_linear.dot_linear; any number of rows, on sm_80 and newer."""

    def __call__(
        self,
        x: torch.Tensor,
        weight: Weight,
        out: torch.Tensor,
        *,
        add: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        """See the class."""
        ...


class AttentionWorkspace(Protocol):
    """float32 elements that paged_attention works in; `capability` as 75 for sm_75."""

    def __call__(
        self, rows: int, heads: int, head_dim: int, table_width: int, capability: int
    ) -> int:
        """See the class."""
        ...


class CopyBlocks(Protocol):
    """See copy_blocks.copy_blocks."""

    def __call__(self, kv_cache: torch.Tensor, pairs: torch.Tensor) -> None:
        """See the class."""
        ...


class Sample(Protocol):
    """See sampling.sample; `sampling` [T, 7] int64 is SamplingParameters.packed."""

    def __call__(
        self,
        logits: torch.Tensor,
        sampling: torch.Tensor,
        out: torch.Tensor,
        *,
        draws: bool,
        filters: bool,
        workspace: Any,
    ) -> None:
        """See the class."""
        ...


class SamplingMemory(Protocol):
    """What `sample` works in, for so many rows of so many logits."""

    def __call__(self, rows: int, vocab_size: int, device: torch.device) -> Any:
        """See the class."""
        ...


@dataclass(frozen=True, slots=True)
class Operations:
    """What one row pass and one prefill are made of. `name` is for people."""

    name: str
    embed: Embed
    layer_norm_linear: LayerNormLinear
    gelu_linear_residual: GeluLinearResidual
    rotary_write_kv: RotaryWriteKv
    paged_attention: PagedAttention
    attention_workspace: AttentionWorkspace
    dequantize_rows: DequantizeRows
    dot_linear: DotLinear
    copy_blocks: CopyBlocks
    sample: Sample
    sampling_memory: SamplingMemory


def triton_operations() -> Operations:
    """The kernels. Imports Triton, so that nothing else has to."""
    import triton

    from gptjet.kernels.gpu.attention_tile import default_tile, workspace_elements
    from gptjet.kernels.gpu.copy_blocks import copy_blocks
    from gptjet.kernels.gpu.dequantize import dequantize_rows
    from gptjet.kernels.gpu.dot_linear import dot_linear
    from gptjet.kernels.gpu.embedding import embed
    from gptjet.kernels.gpu.gelu_linear_residual import gelu_linear_residual
    from gptjet.kernels.gpu.layer_norm_linear import layer_norm_linear
    from gptjet.kernels.gpu.paged_attention import paged_attention
    from gptjet.kernels.gpu.rotary_kv import rotary_write_kv
    from gptjet.kernels.gpu.sampling import SamplingParameters, SamplingWorkspace, sample

    def sample_packed(
        logits: torch.Tensor, sampling: torch.Tensor, out: torch.Tensor, **options: Any
    ) -> None:
        sample(logits, SamplingParameters(sampling), out, **options)

    def workspace(rows: int, heads: int, head_dim: int, table_width: int, capability: int) -> int:
        tile = default_tile(head_dim, capability)
        return workspace_elements(rows, heads, head_dim, table_width, tile)

    return Operations(
        f"Triton {triton.__version__} kernels",
        embed,
        layer_norm_linear,
        gelu_linear_residual,
        rotary_write_kv,
        paged_attention,
        workspace,
        dequantize_rows,
        dot_linear,
        copy_blocks,
        sample_packed,
        SamplingWorkspace.allocate,
    )


def reference_operations(sample: Sample | None = None) -> Operations:
    """`reference`'s functions behind the kernels' signatures, on any device. For tests: they
    allocate, and wait for the device.

    sample  the engine's own sampler, say; None: every row gets its likeliest token
    """
    return Operations(
        "PyTorch references",
        _embed,
        _layer_norm_linear,
        _gelu_linear_residual,
        _rotary_write_kv,
        _paged_attention,
        lambda *_: 0,
        reference.dequantize_rows,
        _dot_linear,
        _copy_blocks,
        sample or _likeliest,
        lambda *_: None,
    )


def _embed(
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    sampled: torch.Tensor,
    embedding: torch.Tensor,
    residual: torch.Tensor,
) -> None:
    ids = torch.where(sources >= 0, sampled[sources.clamp_min(0).long()], token_ids)
    residual.copy_(embedding[ids.clamp_min(0).long()])


def _copy_blocks(kv_cache: torch.Tensor, pairs: torch.Tensor) -> None:
    sources, destinations = pairs.long().unbind(1)
    kv_cache[:, :, destinations] = kv_cache[:, :, sources]


def _likeliest(logits: torch.Tensor, sampling: torch.Tensor, out: torch.Tensor, **_: Any) -> None:
    del sampling  # whatever a row asks for
    usable = logits.amax(1).isfinite()
    out.copy_(torch.where(usable, logits.argmax(1), -1))


def _layer_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    weight: Weight,
    out: torch.Tensor,
    **_: Any,
) -> None:
    normed = reference.layer_norm(x, norm_weight, norm_bias, eps)
    out.copy_(reference.linear(normed, weight))


def _gelu_linear_residual(
    residual: torch.Tensor,
    attended: torch.Tensor,
    inner: torch.Tensor,
    weight: Weight,
    **_: Any,
) -> None:
    reference.gelu_linear_residual(residual, attended.float(), inner.float(), weight)


def _dot_linear(
    x: torch.Tensor, weight: Weight, out: torch.Tensor, *, add: bool = False, **_: Any
) -> None:
    result = reference.linear(x.float(), weight)
    if add:
        out += result
    else:
        out.copy_(result)


def _rotary_write_kv(
    projected: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    sequence_index: torch.Tensor,
    block_tables: torch.Tensor,
    layer_cache: torch.Tensor,
    queries: torch.Tensor,
) -> None:
    real = positions >= 0
    heads, head_dim = queries.shape[1:]
    width = heads * head_dim
    query, key, value = (
        part.reshape(-1, heads, head_dim)
        for part in torch.split(projected[real, : 3 * width], width, 1)
    )
    where = positions[real].long()
    queries.zero_()
    queries[real] = reference.rotary(query, cos[where], sin[where])
    slots = reference.slot_mapping(positions[real], sequence_index[real], block_tables)
    turned = reference.rotary(key, cos[where], sin[where])
    reference.write_kv(layer_cache, turned, value, slots)


def _paged_attention(
    queries: torch.Tensor,
    layer_cache: torch.Tensor,
    positions: torch.Tensor,
    sequence_index: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    **_: Any,
) -> None:
    real = positions >= 0
    out.zero_()
    if bool(real.any()):
        out[real] = reference.paged_attention(
            queries[real].float(), layer_cache, positions[real], sequence_index[real], block_tables
        ).to(out.dtype)
