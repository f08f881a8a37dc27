"""The fused backend on an NVIDIA card: our Triton kernels where they run, and why where not."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from tqdm import tqdm

from gptjet.kernels.gpu import availability
from gptjet.kernels.gpu.availability import KernelsUnavailableError
from gptjet.kernels.gpu.graphs import CaptureError, CudaRecorder
from gptjet.kernels.gpu.model import GpuModel
from gptjet.kernels.gpu.operations import Operations, triton_operations
from gptjet.service.backends.fused.placing import head_to, layers_to
from gptjet.service.models.fused.weights import FusedWeights

logger = logging.getLogger(__name__)

WEIGHT_TYPES = ("float16", "int8", "int4")
"""What the kernels compute."""

interpret_on_cpu = False
"""For tests: see is_interpreted."""


def is_interpreted(device: torch.device) -> bool:
    """Whether the GPU kernels are to run on a CPU: `interpret_on_cpu`, under Triton's interpreter.

    Dense weights are then rounded to float16, as on a card.
    """
    return (
        interpret_on_cpu and device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    )


def load_operations(weight_type: str, device: torch.device) -> Operations:
    """The kernels, one of them launched. Raises KernelsUnavailableError where they do not run."""
    if device.type == "cuda":
        if weight_type not in WEIGHT_TYPES:
            raise KernelsUnavailableError(
                f"the kernels compute {', '.join(WEIGHT_TYPES)} weights, not {weight_type}"
            )
        major, minor = torch.cuda.get_device_capability(device)
        capability, name = 10 * major + minor, torch.cuda.get_device_name(device)
        notes = (
            availability.check_capability(capability, name),
            availability.first_start_note(capability, availability.inspect_toolchain()),
        )
        for note in filter(None, notes):
            logger.warning("%s", note)
    if availability.inspect_toolchain().triton is None:
        raise KernelsUnavailableError("Triton is not installed: pip install 'gptjet[gpu]'")
    availability.check_launch(device)
    return triton_operations()


def build_gpu_model(
    weights: FusedWeights, operations: Operations, device: torch.device, *, max_rows: int
) -> GpuModel:
    """Take the layers of `weights` to the device, one at a time. Dense ones become float16."""
    return GpuModel(
        weights.geometry,
        head_to(weights.head, device, torch.float16),
        layers_to(weights.layers(), device, torch.float16),
        operations,
        max_rows=max_rows,
    )


def record_graphs(model: GpuModel, kv_cache: torch.Tensor, *, progress: bool) -> None:
    """Record the decode step for every bucket of rows; where that fails, the log says why.

    The step is then launched kernel by kernel: right, and slower by what the launches cost.
    """
    buckets = model.buckets
    free_before, _ = torch.cuda.mem_get_info(model.device)
    with tqdm(
        total=len(buckets),
        desc="recording CUDA graphs",
        unit="graph",
        leave=False,
        disable=None if progress else True,
    ) as bar:
        try:
            model.capture(kv_cache, CudaRecorder(model.device), _ticker(bar))
        except CaptureError as error:
            logger.warning(
                "decode steps are launched kernel by kernel, as CUDA graphs could not be "
                "recorded: %s",
                error,
            )
            return
    free_after, _ = torch.cuda.mem_get_info(model.device)
    logger.info(
        "recorded CUDA graphs of %s rows in %d MiB",
        ", ".join(map(str, buckets)),
        (free_before - free_after) >> 20,
    )


def _ticker(bar: tqdm[None]) -> Callable[[int], None]:
    def tick(bucket: int) -> None:
        bar.set_postfix_str(f"{bucket} rows")
        bar.update()

    return tick
