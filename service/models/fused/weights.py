"""From a checkpoint to the fused layout, a layer at a time.

Peak host memory is the model in the wanted format plus the pages of one layer: each layer's files
are mapped, converted tensor by tensor into new memory, and unmapped before the next.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.weights import DenseWeight, HeadWeights, LayerWeights, Weight
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint, is_ignorable_buffer
from gptjet.service.models.fused import families
from gptjet.service.models.fused import recipe as recipes
from gptjet.service.models.fused.description import Description, describe
from gptjet.service.models.fused.families import Family
from gptjet.service.models.fused.layout import (
    DENSE_DTYPES,
    WEIGHT_TYPES,
    WeightType,
    build_weight,
    check_finite,
    is_finite,
)
from gptjet.service.models.fused.quantized import QuantizedFiles
from gptjet.service.models.fused.tensors import TensorFiles
from gptjet.service.models.messages import describe_mismatch

_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class FusedWeights:
    """A checkpoint's weights in the fused layout; the head is loaded, the layers follow once asked.

    description     what was read out of the configuration
    class_name      "GPTJForCausalLM" or "CodeGenForCausalLM"
    num_parameters  of the model; tied weights once
    quantization    the recipe of a checkpoint that `gptjet quantize` wrote, else None
    read_lm_head    reads lm_head once more, for who has given `head` back meanwhile
    """

    def __init__(
        self,
        *,
        description: Description,
        class_name: str,
        head: HeadWeights,
        weight_type: WeightType,
        num_parameters: int,
        quantization: Mapping[str, Any] | None,
        read_layer: Callable[[int], LayerWeights],
        read_lm_head: Callable[[], Weight],
        progress: bool,
    ) -> None:
        self.description = description
        self.class_name = class_name
        self.geometry = description.geometry
        self.head = head
        self.weight_type = weight_type
        self.num_parameters = num_parameters
        self.quantization = quantization
        self.read_lm_head = read_lm_head
        self._read_layer: Callable[[int], LayerWeights] | None = read_layer
        self._progress = progress

    def layers(self) -> Iterator[LayerWeights]:
        """The blocks in order, each read when it is asked for and kept by the caller alone.

        Once: raises RuntimeError the second time. Raises BackendLoadError where a file fails.
        """
        read_layer, self._read_layer = self._read_layer, None
        if read_layer is None:
            raise RuntimeError("the layers were read already: load the checkpoint again")
        return self._read_all(read_layer)

    def _read_all(self, read_layer: Callable[[int], LayerWeights]) -> Iterator[LayerWeights]:
        numbers = track(
            range(self.geometry.num_layers),
            description=f"loading {self.weight_type} weights",
            console=Console(stderr=True),
            transient=True,
            disable=not (self._progress and sys.stderr.isatty()),
        )
        for number in numbers:
            yield read_layer(number)


def load_fused_weights(
    checkpoint: Checkpoint,
    weight_type: WeightType,
    *,
    progress: bool = True,
    description: Description | None = None,
) -> FusedWeights:
    """Check a checkpoint of the GPT-J family and lay its weights out for two passes a layer.

    `weight_type` "int8" and "int4" quantise a float checkpoint on the fly (round to nearest); of
    one that `gptjet quantize` wrote it must be what it holds (`quantized_weight_type`).
    `description` is the checkpoint's, where it is known already: without it transformers, which
    takes 30 MiB of memory, is imported to read the configuration.
    `progress` draws a bar on stderr where that is a terminal. Raises BackendLoadError in one line:
    not of the family, an unusual configuration, tensors missing, unexpected or misshapen.
    """
    if weight_type not in WEIGHT_TYPES:
        raise BackendLoadError(
            f"unknown weight type {weight_type!r}: there are {', '.join(WEIGHT_TYPES)}"
        )
    family = families.check_family(checkpoint)
    if description is None:
        from gptjet.service.models.architecture import build_config

        config = build_config(checkpoint, allow_quantized=checkpoint.is_quantized)
        description = describe(checkpoint, config)
    geometry = description.geometry
    if checkpoint.is_quantized:
        return _load_quantized(checkpoint, description, family, weight_type, progress)
    files = TensorFiles(checkpoint, prefix=families.PREFIX, unprefixed=("lm_head.",))
    ties = families.tied(files.infos, description.is_tied)
    expected = _expected_shapes(family, geometry)
    _check_tensors(checkpoint, family, files, expected, ties)
    return FusedWeights(
        description=description,
        class_name=family.class_name,
        head=_read_head(checkpoint, files, ties, weight_type),
        weight_type=weight_type,
        num_parameters=_count_parameters(expected, ties),
        quantization=None,
        read_layer=lambda number: _read_layer(
            checkpoint, files, family, geometry, number, weight_type
        ),
        read_lm_head=lambda: _read_lm_head(checkpoint, files, ties, weight_type),
        progress=progress,
    )


def quantized_weight_type(checkpoint: Checkpoint) -> WeightType | None:
    """What `gptjet quantize` made of a checkpoint, None for one that it did not write.

    Raises BackendLoadError where its recipe cannot be read.
    """
    if not checkpoint.is_quantized:
        return None
    recipe, _ = recipes.read_recipe(checkpoint)
    return "int8" if recipe.bits == 8 else "int4"


def _load_quantized(
    checkpoint: Checkpoint,
    description: Description,
    family: Family,
    weight_type: WeightType,
    progress: bool,
) -> FusedWeights:
    geometry = description.geometry
    stored = quantized_weight_type(checkpoint)
    if weight_type != stored:
        raise BackendLoadError(
            f"{checkpoint.path} holds {stored} weights and {weight_type} was asked for: give "
            f"{stored}, or the original checkpoint"
        )
    files = QuantizedFiles(checkpoint, geometry)
    ties = families.tied([families.EMBEDDING], description.is_tied)
    return FusedWeights(
        description=description,
        class_name=family.class_name,
        head=files.read_head(),
        weight_type=weight_type,
        num_parameters=_count_parameters(_expected_shapes(family, geometry), ties),
        quantization=files.recipe.as_dict(),
        read_layer=files.read_layer,
        read_lm_head=files.read_lm_head,
        progress=progress,
    )


def _count_parameters(shapes: Mapping[str, tuple[int, ...]], ties: Mapping[str, str]) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in ties)


def _expected_shapes(family: Family, geometry: BlockGeometry) -> dict[str, tuple[int, ...]]:
    shapes = families.head_shapes(geometry)
    for layer in range(geometry.num_layers):
        shapes |= families.layer_shapes(family, geometry, layer)
    return shapes


def _check_tensors(
    checkpoint: Checkpoint,
    family: Family,
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    ties: Mapping[str, str],
) -> None:
    found = files.infos
    message = describe_mismatch(
        str(checkpoint.path),
        family.class_name,
        missing=[n for n in expected if ties.get(n, n) not in found],
        unexpected=[n for n in found if n not in expected and not is_ignorable_buffer(n)],
        misshapen=[
            f"{name} {list(found[name].shape)} (the model has {list(shape)})"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
    )
    if message:
        raise BackendLoadError(message)
    for name in expected:
        if name in found and found[name].dtype not in _FLOAT_DTYPES:
            raise BackendLoadError(
                f"{checkpoint.path}: {name} is stored as {found[name].dtype}; weights are served "
                f"from {', '.join(sorted(_FLOAT_DTYPES))}"
            )


def _read_head(
    checkpoint: Checkpoint, files: TensorFiles, ties: Mapping[str, str], weight_type: WeightType
) -> HeadWeights:
    where = f"{checkpoint.path}: "
    with files.open([families.NORM_WEIGHT, families.NORM_BIAS, families.LM_HEAD_BIAS]) as held:
        norm_weight = _vector(held[families.NORM_WEIGHT], where + families.NORM_WEIGHT)
        norm_bias = _vector(held[families.NORM_BIAS], where + families.NORM_BIAS)
        bias = _vector(held[families.LM_HEAD_BIAS], where + families.LM_HEAD_BIAS)
    stored = ties.get(families.EMBEDDING, families.EMBEDDING)
    with files.open([stored]) as held:
        embedding = _embedding(held[stored], weight_type, where + stored)
    if ties and embedding.dtype == DENSE_DTYPES.get(weight_type):
        return HeadWeights(embedding, norm_weight, norm_bias, DenseWeight(embedding, bias))
    lm_head = _read_lm_head(checkpoint, files, ties, weight_type)
    return HeadWeights(embedding, norm_weight, norm_bias, lm_head)


def _read_lm_head(
    checkpoint: Checkpoint, files: TensorFiles, ties: Mapping[str, str], weight_type: WeightType
) -> Weight:
    where = f"{checkpoint.path}: "
    stored = ties.get(families.LM_HEAD, families.LM_HEAD)
    with files.open([stored, families.LM_HEAD_BIAS]) as held:
        bias = _vector(held[families.LM_HEAD_BIAS], where + families.LM_HEAD_BIAS)
        return build_weight([held[stored]], 0, weight_type, bias=bias, name=where + stored)


def _embedding(stored: torch.Tensor, weight_type: WeightType, name: str) -> torch.Tensor:
    """float32 where the weights are, else float16, which is kept looked up, not computed.

    A bfloat16 embedding beyond float16's range stays what it is in float32.
    """
    if weight_type != "fp32":
        embedding = stored.to(torch.float16)
        if is_finite(embedding):
            return embedding
    embedding = stored.to(torch.float32)
    check_finite(embedding, name, stored.dtype)
    return embedding


def _read_layer(
    checkpoint: Checkpoint,
    files: TensorFiles,
    family: Family,
    geometry: BlockGeometry,
    number: int,
    weight_type: WeightType,
) -> LayerWeights:
    prefix = f"{families.PREFIX}h.{number}."
    where = f"{checkpoint.path}: {prefix}"
    with files.open(families.layer_shapes(family, geometry, number)) as held:
        fc_in_bias = _vector(held[prefix + "mlp.fc_in.bias"], where + "mlp.fc_in.bias")
        bias = torch.zeros(3 * geometry.hidden_size + geometry.inner_size)
        bias[3 * geometry.hidden_size :] = fc_in_bias
        projections = family.split([held[prefix + name] for name in family.projections])
        return LayerWeights(
            norm_weight=_vector(held[prefix + "ln_1.weight"], where + "ln_1.weight"),
            norm_bias=_vector(held[prefix + "ln_1.bias"], where + "ln_1.bias"),
            w_in=build_weight(
                [*projections, held[prefix + "mlp.fc_in.weight"]],
                0,
                weight_type,
                bias=bias,
                name=f"{where}attn or mlp.fc_in",
            ),
            w_out=build_weight(
                [held[prefix + "attn.out_proj.weight"], held[prefix + "mlp.fc_out.weight"]],
                1,
                weight_type,
                bias=_vector(held[prefix + "mlp.fc_out.bias"], where + "mlp.fc_out.bias"),
                name=f"{where}attn.out_proj or mlp.fc_out",
            ),
        )


def _vector(stored: torch.Tensor, name: str) -> torch.Tensor:
    """In float32."""
    vector = stored.float()
    check_finite(vector, name, stored.dtype)
    return vector
