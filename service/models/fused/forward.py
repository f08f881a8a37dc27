"""The forward pass of a GPT-J-class model over a paged KV cache, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from gptjet.kernels import reference
from gptjet.kernels.weights import DenseWeight, Int8Weight

if TYPE_CHECKING:
    from gptjet.kernels.batch import BlockGeometry, ForwardBatch
    from gptjet.kernels.weights import HeadWeights, LayerWeights, Weight


class TorchModel:
    """Works on every device and with every weight format; what the kernels are compared with.

    Weights of another dtype than `compute_dtype` are converted into one buffer of 64 MiB each time
    they are used. Weights, KV cache and compute are on the device of the embedding.
    """

    def __init__(
        self,
        geometry: BlockGeometry,
        head: HeadWeights,
        layers: Iterable[LayerWeights],
        *,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._geometry = geometry
        self._head: HeadWeights | None = head
        self._layers = list(layers)
        if len(self._layers) != geometry.num_layers:
            raise ValueError(f"{len(self._layers)} layers given, {geometry.num_layers} expected")
        self._dtype = compute_dtype
        self._device = head.embedding.device
        self._scratch = reference.Scratch()
        self._cos, self._sin = reference.rotary_tables(
            geometry.max_context, geometry.rotary_dim, self._device
        )

    @property
    def geometry(self) -> BlockGeometry:
        """The model's sizes."""
        return self._geometry

    @property
    def nbytes(self) -> int:
        """Bytes of weights and buffers; a tensor that two weights share counts once."""
        if self._head is None:
            return 0
        tensors = [self._head.embedding, self._head.norm_weight, self._head.norm_bias]
        tensors += [self._cos, self._sin, *_tensors_of(self._head.lm_head)]
        for layer in self._layers:
            tensors += [layer.norm_weight, layer.norm_bias]
            tensors += [*_tensors_of(layer.w_in), *_tensors_of(layer.w_out)]
        by_storage = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
        return sum(by_storage.values()) + self._scratch.nbytes

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] float32 of the tokens that batch.logits_rows names.

        kv_cache [layers, 2, num_blocks, heads, BLOCK_SIZE, head_dim], any float dtype, or int8 with
        INT8_KV_ROWS rows: the keys and values of the batch's tokens are written to it. Raises
        ValueError once closed.
        """
        head = self._head
        if head is None:
            raise ValueError("the model is closed")
        positions = batch.positions.to(self._device)
        sequence_index = batch.sequence_index.to(self._device)
        block_tables = batch.block_tables.to(self._device)
        slots = reference.slot_mapping(positions, sequence_index, block_tables)
        cos, sin = self._cos[positions.long()], self._sin[positions.long()]
        residual = head.embedding[batch.token_ids.long().to(self._device)].float()
        for index, layer in enumerate(self._layers):
            queries, keys, values, inner = self._first_pass(residual, layer)
            queries = reference.rotary(queries, cos, sin)
            reference.write_kv(kv_cache[index], reference.rotary(keys, cos, sin), values, slots)
            attended = reference.paged_attention(
                queries, kv_cache[index], positions, sequence_index, block_tables
            )
            reference.gelu_linear_residual(
                residual, attended, inner, layer.w_out, scratch=self._scratch
            )
        wanted = residual[batch.logits_rows.long().to(self._device)]
        logits = reference.layer_norm_linear(
            wanted,
            head.norm_weight,
            head.norm_bias,
            self._geometry.layer_norm_eps,
            head.lm_head,
            compute_dtype=self._dtype,
            scratch=self._scratch,
        )
        return logits.float()

    def close(self) -> None:
        """Give the weights' memory back. Nothing is computed afterwards; twice is fine."""
        self._head = None
        self._layers.clear()
        self._scratch.release()

    def _first_pass(self, residual: torch.Tensor, layer: LayerWeights) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [T, heads, head_dim] before rotary, and the MLP's [T, inner]."""
        projected = reference.layer_norm_linear(
            residual,
            layer.norm_weight,
            layer.norm_bias,
            self._geometry.layer_norm_eps,
            layer.w_in,
            compute_dtype=self._dtype,
            scratch=self._scratch,
        )
        heads, head_dim = self._geometry.num_heads, self._geometry.head_dim
        width = heads * head_dim
        sizes = [width, width, width, self._geometry.inner_size]
        query, key, value, inner = torch.split(projected, sizes, dim=1)
        shape = (-1, heads, head_dim)
        return query.reshape(shape), key.reshape(shape), value.reshape(shape), inner


def _tensors_of(weight: Weight) -> list[torch.Tensor]:
    if isinstance(weight, DenseWeight):
        tensors = [weight.weight]
    elif isinstance(weight, Int8Weight):
        tensors = [weight.quantized, weight.scale]
    else:
        tensors = [weight.packed, weight.scale]
    return tensors if weight.bias is None else [*tensors, weight.bias]
