"""Reading the checkpoints that `gptjet quantize` writes: the fused layout, ready to be used."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.weights import (
    INT4_GROUP,
    HeadWeights,
    Int4Weight,
    Int8Weight,
    LayerWeights,
    Weight,
)
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.fused import recipe as recipes
from gptjet.service.models.fused.layout import check_finite
from gptjet.service.models.fused.recipe import Recipe
from gptjet.service.models.fused.tensors import TensorFiles
from gptjet.service.models.messages import describe_mismatch
from gptjet.service.models.safetensors_header import TensorInfo


class QuantizedFiles:
    """The files of a quantised checkpoint, checked, and the weights in them.

    Raises BackendLoadError in one line where they were made for another model, group size or
    number of bits, are of several runs, or are corrupt.
    """

    def __init__(self, checkpoint: Checkpoint, geometry: BlockGeometry) -> None:
        if checkpoint.is_pickle:
            raise BackendLoadError(f"{checkpoint.path}: quantised weights are safetensors only")
        self.recipe, checksums = recipes.read_recipe(checkpoint)
        recipes.check_geometry(checkpoint, self.recipe, geometry)
        recipes.check_files(checkpoint, self.recipe, checksums)
        self._path = checkpoint.path
        self._geometry = geometry
        self._files = TensorFiles(checkpoint)
        _check_tensors(checkpoint, self._files, geometry, self.recipe)

    def read_head(self) -> HeadWeights:
        """What stands outside the blocks."""
        names = [
            recipes.EMBEDDING,
            *(f"{recipes.FINAL_NORM}.{part}" for part in ("weight", "bias")),
            *self._names_of(recipes.LM_HEAD),
        ]
        with self._files.open(names) as held:
            return HeadWeights(
                embedding=self._read(held, recipes.EMBEDDING),
                norm_weight=self._read(held, f"{recipes.FINAL_NORM}.weight"),
                norm_bias=self._read(held, f"{recipes.FINAL_NORM}.bias"),
                lm_head=self._weight(held, recipes.LM_HEAD, self._geometry.hidden_size),
            )

    def read_lm_head(self) -> Weight:
        """The head's matrix alone."""
        with self._files.open(self._names_of(recipes.LM_HEAD)) as held:
            return self._weight(held, recipes.LM_HEAD, self._geometry.hidden_size)

    def read_layer(self, number: int) -> LayerWeights:
        """One block."""
        prefix = f"layers.{number}."
        geometry = self._geometry
        names = [
            *(f"{prefix}norm.{part}" for part in ("weight", "bias")),
            *self._names_of(prefix + "w_in"),
            *self._names_of(prefix + "w_out"),
        ]
        joined = geometry.num_heads * geometry.head_dim + geometry.inner_size
        with self._files.open(names) as held:
            return LayerWeights(
                norm_weight=self._read(held, prefix + "norm.weight"),
                norm_bias=self._read(held, prefix + "norm.bias"),
                w_in=self._weight(held, prefix + "w_in", geometry.hidden_size),
                w_out=self._weight(held, prefix + "w_out", joined),
            )

    def _names_of(self, weight: str) -> list[str]:
        levels = "quantized" if self.recipe.bits == 8 else "packed"
        return [f"{weight}.{part}" for part in (levels, "scale", "bias")]

    def _weight(self, held: Mapping[str, torch.Tensor], name: str, inputs: int) -> Weight:
        levels, scale, bias = (self._read(held, part) for part in self._names_of(name))
        if self.recipe.bits == 8:
            return Int8Weight(levels, scale, bias)
        return Int4Weight(levels, scale, inputs, INT4_GROUP, bias)

    def _read(self, held: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        tensor = held[name]
        if tensor.is_floating_point():
            check_finite(tensor, f"{self._path}: {name}", tensor.dtype)
        return tensor


def tensors_of(name: str, weight: Weight) -> dict[str, torch.Tensor]:
    """A quantised weight as it is stored. Raises TypeError for a dense one."""
    outputs = weight.shape[0]
    bias = torch.zeros(outputs) if weight.bias is None else weight.bias
    if isinstance(weight, Int8Weight):
        levels = {f"{name}.quantized": weight.quantized}
    elif isinstance(weight, Int4Weight):
        levels = {f"{name}.packed": weight.packed}
    else:
        raise TypeError(f"{name} is not quantised")
    return {**levels, f"{name}.scale": weight.scale, f"{name}.bias": bias}


def _check_tensors(
    checkpoint: Checkpoint, files: TensorFiles, geometry: BlockGeometry, recipe: Recipe
) -> None:
    found = files.infos
    expected = recipes.expected_tensors(geometry, recipe.bits)
    embedding = found.get(recipes.EMBEDDING)
    if embedding is not None and embedding.dtype == "F32":
        expected[recipes.EMBEDDING] = TensorInfo("F32", expected[recipes.EMBEDDING].shape)
    message = describe_mismatch(
        str(checkpoint.path),
        f"an INT{recipe.bits} {checkpoint.architecture or checkpoint.model_type}",
        missing=[name for name in expected if name not in found],
        unexpected=[name for name in found if name not in expected],
        misshapen=[
            f"{name} {found[name].dtype} {list(found[name].shape)} "
            f"(the model has {info.dtype} {list(info.shape)})"
            for name, info in expected.items()
            if name in found and found[name] != info
        ],
    )
    if message:
        raise BackendLoadError(message)
