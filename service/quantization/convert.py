"""From a float checkpoint to a quantised one, a layer at a time."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gptjet.kernels.weights import (
    INT4_GROUP,
    DenseWeight,
    LayerWeights,
    Weight,
    quantize_int4,
    quantize_int8,
)
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused import recipe as recipes
from gptjet.service.models.fused.layout import is_finite
from gptjet.service.models.fused.quantized import tensors_of
from gptjet.service.models.fused.recipe import Recipe
from gptjet.service.models.fused.weights import FusedWeights
from gptjet.service.quantization.calibration import Activations
from gptjet.service.quantization.gptq import Hessian, gptq_int4
from gptjet.service.quantization.writer import MAX_SHARD_BYTES, CheckpointWriter

if TYPE_CHECKING:
    import torch

Method: TypeAlias = Literal["rtn", "gptq"]
_VERSIONS = ("gptjet", "torch", "transformers", "safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token sequences to round against, and what the recipe says of them."""

    name: str
    sha256: str
    sequences: Sequence[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Over all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    def as_dict(self) -> dict[str, Any]:
        """For the recipe."""
        return {"text": self.name, "sha256": self.sha256, "tokens": self.num_tokens}


def build_recipe(
    checkpoint: Checkpoint,
    weights: FusedWeights,
    *,
    bits: int,
    method: Method,
    calibration: CalibrationSet | None,
) -> Recipe:
    """What `write_quantized` is going to do, as the files will say it."""
    return Recipe(
        method=method,
        bits=bits,
        group=INT4_GROUP if bits == 4 else None,
        calibration=None if calibration is None else calibration.as_dict(),
        source={
            "model": checkpoint.name,
            "config_sha256": recipes.config_sha256(checkpoint.config),
        },
        geometry=dataclasses.asdict(weights.geometry),
        versions=_versions(),
    )


def write_quantized(
    checkpoint: Checkpoint,
    weights: FusedWeights,
    folder: Path,
    *,
    bits: int,
    method: Method,
    calibration: CalibrationSet | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_layer: Callable[[], None] = lambda: None,
) -> Recipe:
    """Quantise the layers and the output matrix into `folder`, which exists; the recipe.

    `weights` are dense and their layers unread. "gptq" needs `calibration`, and rounds each layer
    against what it receives from the layers already rounded. `on_layer` is called after each layer
    and after the output matrix.
    """
    recipe = build_recipe(checkpoint, weights, bits=bits, method=method, calibration=calibration)
    writer = CheckpointWriter(folder, recipe, max_shard_bytes)
    activations = None
    if method == "gptq":
        if bits != 4 or calibration is None:
            raise ValueError("gptq is for 4 bits and needs calibration text")
        activations = Activations(weights.geometry, weights.head, calibration.sequences)
    head = weights.head
    writer.add(
        {
            recipes.EMBEDDING: _narrowed(head.embedding),
            f"{recipes.FINAL_NORM}.weight": head.norm_weight,
            f"{recipes.FINAL_NORM}.bias": head.norm_bias,
        }
    )
    for number, layer in enumerate(weights.layers()):
        writer.add(_layer_tensors(number, _round_layer(layer, bits, activations, number)))
        on_layer()
    inputs = activations.normed(head.norm_weight, head.norm_bias) if activations else None
    writer.add(tensors_of(recipes.LM_HEAD, _round(head.lm_head, bits, inputs, "the output matrix")))
    on_layer()
    writer.finish(checkpoint)
    return recipe


def _narrowed(embedding: torch.Tensor) -> torch.Tensor:
    """The embedding in float16, where it fits: it is looked up, not computed with."""
    narrow = embedding.half()
    return narrow if is_finite(narrow) else embedding


def _round_layer(
    layer: LayerWeights, bits: int, activations: Activations | None, number: int
) -> LayerWeights:
    norm = (layer.norm_weight, layer.norm_bias)
    inputs = activations.normed(*norm) if activations else None
    w_in = _round(layer.w_in, bits, inputs, f"layer {number}, first pass")
    inputs = activations.second_inputs(*norm, w_in) if activations else None
    w_out = _round(layer.w_out, bits, inputs, f"layer {number}, second pass")
    if activations is not None:
        activations.advance(*norm, w_in, w_out)
    return LayerWeights(*norm, w_in, w_out)


def _round(weight: Weight, bits: int, inputs: Iterable[torch.Tensor] | None, where: str) -> Weight:
    if not isinstance(weight, DenseWeight):
        raise TypeError(f"{where} is quantised already")
    values = weight.weight.float()
    if bits == 8:
        return quantize_int8(values, weight.bias)
    if inputs is None:
        return quantize_int4(values, weight.bias)
    hessian = Hessian(values.shape[1])
    for piece in inputs:
        hessian.add(piece)
    try:
        return gptq_int4(values, hessian, weight.bias)
    except ValueError as error:
        raise BackendLoadError(f"{where}: {error}: use --method rtn") from error


def _layer_tensors(number: int, layer: LayerWeights) -> dict[str, torch.Tensor]:
    prefix = f"layers.{number}."
    return {
        f"{prefix}norm.weight": layer.norm_weight,
        f"{prefix}norm.bias": layer.norm_bias,
        **tensors_of(f"{prefix}w_in", layer.w_in),
        **tensors_of(f"{prefix}w_out", layer.w_out),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "unknown"  # run from a checkout that is not installed
    return versions
