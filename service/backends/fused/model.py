"""What computes: our kernels where the device has them, PyTorch elsewhere."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.cpu import CpuModel, NativeUnavailableError, native_library
from gptjet.kernels.gpu.availability import KernelsUnavailableError
from gptjet.service.backends.fused import gpu
from gptjet.service.backends.fused.placing import head_to, layers_to
from gptjet.service.backends.fused.runner import FusedModel
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.fused.forward import TorchModel
from gptjet.service.models.fused.layout import WeightType
from gptjet.service.models.fused.weights import FusedWeights
from gptjet.service.models.messages import one_line

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
# PyTorch converts what it reads of a KV cache to what it computes in.
_TORCH_KV = (torch.float16, torch.float32, torch.int8)


@dataclass(frozen=True, slots=True)
class Computer:
    """A model ready to compute.

    kv_dtype           of its KV cache, and what it computes in
    other_kv_dtypes    that its KV cache may be of instead
    is_batch_invariant what it computes for a token never depends on the other tokens of a pass
    description        of what computes, for people
    """

    model: FusedModel
    kv_dtype: torch.dtype
    is_batch_invariant: bool
    description: str
    other_kv_dtypes: tuple[torch.dtype, ...] = ()


def check_weight_type(name: str, device: torch.device) -> None:
    """Raise BackendLoadError for a weight type that the fused backend does not compute there."""
    if device.type == "cpu" and name not in _ON_CPU:
        raise BackendLoadError(
            f"the fused backend computes {', '.join(_ON_CPU)} weights on a CPU, not {name}"
        )


def check_kv_cache_dtype(name: str, geometry: BlockGeometry, device: torch.device) -> None:
    """Raise BackendLoadError for a KV cache that cannot be had, before weights are read."""
    if name == "int8":
        try:
            _ = geometry.int8_kv_block_shape
        except ValueError as error:
            raise BackendLoadError(f"kv_cache_dtype int8: {error}") from error
    on_cpu = device.type == "cpu" and not gpu.is_interpreted(device)
    if on_cpu and name not in ("auto", "float32"):
        try:
            native_library()
        except NativeUnavailableError:
            return  # PyTorch will compute
        raise BackendLoadError(
            f"kv_cache_dtype {name}: the CPU kernels keep their KV cache in float32, so it may be "
            f"auto or float32 there; float16 and int8 are for GPUs"
        )


def choose_kv_dtype(name: str, computer: Computer) -> torch.dtype:
    """The dtype that `--kv-cache-dtype` names; "auto" is what is computed in.

    Raises BackendLoadError where the computer has no such KV cache.
    """
    if name == "auto":
        return computer.kv_dtype
    possible = {str(dtype).removeprefix("torch."): dtype for dtype in computer.other_kv_dtypes}
    possible[str(computer.kv_dtype).removeprefix("torch.")] = computer.kv_dtype
    if name not in possible:
        raise BackendLoadError(
            f"kv_cache_dtype {name}: {computer.description} can have auto, "
            f"{', '.join(sorted(possible))}"
        )
    return possible[name]


def build_model(
    weights: FusedWeights,
    weight_type: str,
    device: torch.device,
    *,
    num_threads: int,
    max_rows: int = 1,
) -> Computer:
    """Take the layers of `weights` into the fastest model that runs on `device`.

    Where the kernels for a device cannot be had (no compiler, another processor, a card that they
    are not for) the log says why and PyTorch computes. `max_rows` is the most sequences that decode
    together.
    """
    if device.type != "cpu" or gpu.is_interpreted(device):
        return _build_on_gpu(weights, weight_type, device, max_rows)
    layers = weights.layers()  # untouched where the kernels cannot be had
    try:
        native = CpuModel.pack(
            weights.geometry,
            weights.head,
            layers,
            num_threads=num_threads,
            take=True,
        )
    except NativeUnavailableError as error:
        reason = one_line(error)
        logger.warning("no kernels for this CPU, PyTorch computes instead: %s", reason)
        torch_model = TorchModel(weights.geometry, weights.head, layers)
        return Computer(
            torch_model,
            torch.float32,
            False,
            f"PyTorch {torch.__version__} on {num_threads} threads, as there are no kernels for "
            f"this CPU ({reason})",
            other_kv_dtypes=_TORCH_KV,
        )
    except (ValueError, MemoryError) as error:
        raise BackendLoadError(
            f"the CPU kernels cannot take the weights: {one_line(error)}"
        ) from error
    return Computer(native, torch.float32, True, f"CPU kernels on {num_threads} threads")


def _build_on_gpu(
    weights: FusedWeights, weight_type: str, device: torch.device, max_rows: int
) -> Computer:
    try:
        operations = gpu.load_operations(weight_type, device)
    except KernelsUnavailableError as error:
        reason = one_line(error)
        logger.warning("PyTorch computes instead of the GPU kernels: %s", reason)
        compute = _COMPUTE.get(weight_type, torch.float16)
        torch_model = TorchModel(
            weights.geometry,
            head_to(weights.head, device),
            layers_to(weights.layers(), device),
            compute_dtype=compute,
        )
        return Computer(
            torch_model,
            compute,
            False,
            f"PyTorch {torch.__version__}, as the GPU kernels cannot be used ({reason})",
            other_kv_dtypes=_TORCH_KV,
        )
    model = gpu.build_gpu_model(weights, operations, device, max_rows=max_rows)
    return Computer(model, torch.float16, False, operations.name, other_kv_dtypes=(torch.int8,))
