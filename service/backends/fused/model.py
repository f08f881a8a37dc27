"""What computes: our kernels where the device has them, PyTorch elsewhere."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gptjet.kernels.cpu import CpuModel, NativeUnavailableError
from gptjet.kernels.gpu.availability import KernelsUnavailableError
from gptjet.kernels.weights import DenseWeight, HeadWeights, Int8Weight, LayerWeights, Weight
from gptjet.service.backends.fused import gpu
from gptjet.service.backends.fused.placing import head_to, layers_to
from gptjet.service.backends.fused.runner import FusedModel
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import one_line
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.layout import WeightType
from gptjet.service.models.fused.weights import FusedWeights

logger = logging.getLogger(__name__)

# Names of --dtype, and what the loader of weights calls them.
WEIGHT_TYPES: dict[str, WeightType] = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "int4": "int4",
}
_ON_CPU = ("float32", "int8", "int4")
_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Computer:
    """A model ready to compute.

    compute_dtype      of its activations
    kv_dtype           of its KV cache; int8 has its scales in it
    is_batch_invariant what it computes for a token never depends on the other tokens of a pass
    description        of what computes, for people
    """

    model: FusedModel
    compute_dtype: torch.dtype
    kv_dtype: torch.dtype
    is_batch_invariant: bool
    description: str


def check_weight_type(name: str, device: torch.device) -> None:
    """Raise BackendLoadError for a weight type that the fused backend does not compute there."""
    if device.type == "cpu" and name not in _ON_CPU:
        raise BackendLoadError(
            f"the fused backend computes {', '.join(_ON_CPU)} weights on a CPU, not {name}"
        )


def build_model(
    weights: FusedWeights,
    weight_type: str,
    device: torch.device,
    *,
    num_threads: int,
    max_rows: int = 1,
    kv_cache_dtype: str = "auto",
) -> Computer:
    """Take the layers of `weights` into the fastest model that runs on `device`.

    Where the kernels for a device cannot be had (no compiler, another processor, a card that they
    are not for) the log says why and PyTorch computes.

    max_rows        most sequences that decode together
    kv_cache_dtype  "auto" for what is computed in, or "int8", which only the GPU kernels know:
                    raises BackendLoadError elsewhere
    """
    if device.type != "cpu" or gpu.is_interpreted(device):
        return _build_on_gpu(weights, weight_type, device, max_rows, kv_cache_dtype)
    if kv_cache_dtype != "auto":
        raise BackendLoadError(_int8_kv_needs_kernels("a CPU has others"))
    layers = weights.layers()  # untouched where the kernels cannot be had
    try:
        native = CpuModel.pack(
            weights.geometry,
            weights.head,
            _giving_up_head(weights.head, layers),
            num_threads=num_threads,
        )
    except NativeUnavailableError as error:
        reason = one_line(error)
        logger.warning("no kernels for this CPU, PyTorch computes instead: %s", reason)
        torch_model = TorchModel(weights.geometry, weights.head, layers)
        return Computer(
            torch_model,
            torch.float32,
            torch.float32,
            False,
            f"PyTorch {torch.__version__} on {num_threads} threads, as there are no kernels for "
            f"this CPU ({reason})",
        )
    except (ValueError, MemoryError) as error:
        raise BackendLoadError(
            f"the CPU kernels cannot take the weights: {one_line(error)}"
        ) from error
    return Computer(
        native, torch.float32, torch.float32, True, f"CPU kernels on {num_threads} threads"
    )


def _giving_up_head(head: HeadWeights, layers: Iterator[LayerWeights]) -> Iterator[LayerWeights]:
    """The layers; the head's memory goes between the first two.

    `pack` has copied the head before it asks for a second layer, and its caller's own head would
    stay beside that copy until the end: at a width of 4096, half of an INT8 model again.
    """
    yield from itertools.islice(layers, 1)
    for weight in (head.embedding, _stored(head.lm_head)):
        weight.data = weight.new_empty(0)
    yield from layers


def _stored(weight: Weight) -> torch.Tensor:
    if isinstance(weight, DenseWeight):
        return weight.weight
    return weight.quantized if isinstance(weight, Int8Weight) else weight.packed


def _build_on_gpu(
    weights: FusedWeights,
    weight_type: str,
    device: torch.device,
    max_rows: int,
    kv_cache_dtype: str,
) -> Computer:
    half = torch.float16
    kv_dtype = torch.int8 if kv_cache_dtype == "int8" else half
    try:
        operations = gpu.load_operations(weight_type, device)
    except KernelsUnavailableError as error:
        reason = one_line(error)
        if kv_dtype is torch.int8:
            raise BackendLoadError(_int8_kv_needs_kernels(reason)) from error
        logger.warning("PyTorch computes instead of the GPU kernels: %s", reason)
        return _build_torch_on_gpu(weights, weight_type, device, reason)
    if kv_dtype is torch.int8:
        try:
            _ = weights.geometry.int8_kv_block_shape
        except ValueError as error:
            raise BackendLoadError(f"kv_cache_dtype int8: {error}") from error
    model = gpu.build_gpu_model(weights, operations, device, max_rows=max_rows)
    name = "INT8" if kv_dtype is torch.int8 else "FP16"
    return Computer(model, half, kv_dtype, False, f"{operations.name}, {name} KV cache")


def _build_torch_on_gpu(
    weights: FusedWeights, weight_type: str, device: torch.device, reason: str
) -> Computer:
    compute = _COMPUTE.get(weight_type, torch.float16)
    model = TorchModel(
        weights.geometry,
        head_to(weights.head, device),
        layers_to(weights.layers(), device),
        compute_dtype=compute,
    )
    description = f"PyTorch {torch.__version__}, as the GPU kernels cannot be used ({reason})"
    return Computer(model, compute, compute, False, description)


def _int8_kv_needs_kernels(reason: str) -> str:
    return f"kv_cache_dtype int8 needs the GPU kernels of the fused backend: {reason}"
