"""Weights from where they were read to the device that computes with them, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from gptjet.kernels.weights import DenseWeight, HeadWeights, Int8Weight, LayerWeights, Weight

if TYPE_CHECKING:
    import torch


def layers_to(
    layers: Iterator[LayerWeights], device: torch.device, dense_dtype: torch.dtype | None = None
) -> Iterator[LayerWeights]:
    """Each layer on `device`, its dense weights in `dense_dtype` (None: as they are)."""
    for layer in layers:
        yield LayerWeights(
            layer.norm_weight.to(device),
            layer.norm_bias.to(device),
            _weight_to(layer.w_in, device, dense_dtype),
            _weight_to(layer.w_out, device, dense_dtype),
        )


def head_to(
    head: HeadWeights, device: torch.device, dense_dtype: torch.dtype | None = None
) -> HeadWeights:
    """The head likewise; a tied lm_head shares the embedding's memory there too.

    An embedding that `dense_dtype` cannot hold stays as it is: it is looked up, not computed with.
    """
    embedding = head.embedding.to(device, dense_dtype)
    if not bool(embedding.isfinite().all()):
        embedding = head.embedding.to(device)
    lm_head = head.lm_head
    if isinstance(lm_head, DenseWeight) and lm_head.weight is head.embedding:
        lm_head = replace(lm_head, weight=embedding)
    return HeadWeights(
        embedding,
        head.norm_weight.to(device),
        head.norm_bias.to(device),
        _weight_to(lm_head, device, dense_dtype),
    )


def _weight_to(weight: Weight, device: torch.device, dense_dtype: torch.dtype | None) -> Weight:
    bias = None if weight.bias is None else weight.bias.to(device)
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight.to(device, dense_dtype), bias)
    if isinstance(weight, Int8Weight):
        return Int8Weight(weight.quantized.to(device), weight.scale.to(device), bias)
    return replace(
        weight, packed=weight.packed.to(device), scale=weight.scale.to(device), bias=bias
    )
