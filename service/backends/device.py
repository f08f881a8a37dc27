"""Choosing where and in what precision a model runs, or saying in one line why it cannot."""

from __future__ import annotations

import gc
import re

import torch

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.memory import available_host_bytes

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_FLOAT_NAMES = "auto, float32 (fp32), bfloat16 (bf16), float16 (fp16)"
QUANTIZED = ("int8", "int4")
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def choose_device(name: str = "auto") -> torch.device:
    """The device called "auto" (a GPU where PyTorch sees one), "cpu", "cuda" or "cuda:N".

    Raises BackendLoadError for another name, a GPU that is not there, and one this PyTorch has no
    machine code for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not _DEVICE.fullmatch(name):
        raise BackendLoadError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        reason = (
            "PyTorch sees none: check nvidia-smi and the driver"
            if torch.version.cuda
            else f"this PyTorch ({torch.__version__}) is built without CUDA"
        )
        raise BackendLoadError(f"device {name} needs an NVIDIA GPU and {reason}; or give cpu")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise BackendLoadError(f"there is no {name}: PyTorch sees {torch.cuda.device_count()} GPUs")
    _check_machine_code(index)
    return torch.device("cuda", index)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`: "auto" is FP16 on a GPU and FP32 on a CPU.

    Raises BackendLoadError for an unknown name, for a precision the device is no use for, and for
    INT8 and INT4, which only the fused backend computes (it asks `choose_weight_type`).
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name in QUANTIZED:
        raise BackendLoadError(
            f"{name} weights are for the fused backend: give --backend fused, or another dtype "
            f"({_FLOAT_NAMES})"
        )
    dtype = _DTYPES.get(name)
    if dtype is None:
        raise BackendLoadError(f"unknown dtype {name!r}: give {_FLOAT_NAMES}, int8 or int4")
    if dtype is torch.float16 and device.type == "cpu":
        raise BackendLoadError(
            "float16 is for GPUs: a CPU computes it by conversion, slower than float32 and less "
            "exact; give float32 or bfloat16"
        )
    if dtype is torch.bfloat16 and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise BackendLoadError(
                f"bfloat16 needs compute capability 8.0 or newer, "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}; give float16"
            )
    return dtype


def choose_weight_type(name: str, device: torch.device, stored: str | None = None) -> str:
    """As `choose_dtype`, by name ("float32", "float16", "bfloat16"), and "int8" and "int4" too.

    `stored` is the type of a checkpoint that is quantised already, which no other name can change.
    Raises BackendLoadError.
    """
    if stored is not None:
        if name not in ("auto", stored):
            raise BackendLoadError(
                f"dtype {name} contradicts the checkpoint, whose weights are {stored} already: "
                f"leave dtype at auto"
            )
        return stored
    return name if name in QUANTIZED else dtype_name(choose_dtype(name, device))


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float16` as "float16"."""
    return str(dtype).removeprefix("torch.")


def give_back(device: torch.device) -> None:
    """Return what a model that is gone has held to the device, where others can see it is free."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Memory a model may take there now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_host_bytes()


def _check_machine_code(index: int) -> None:
    """A wheel carries code for some GPU generations; on another the first kernel would fail."""
    major, minor = torch.cuda.get_device_capability(index)
    built_for = torch.cuda.get_arch_list()
    codes = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch) for arch in built_for]
    runs = any(
        match
        # sm_XY runs on X.Y and later of the same major; PTX (compute_XY) on anything newer.
        and (
            (match[1] == "sm" and int(match[2]) == major and int(match[3]) <= minor)
            or (match[1] == "compute" and (int(match[2]), int(match[3])) <= (major, minor))
        )
        for match in codes
    )
    if built_for and not runs:
        raise BackendLoadError(
            f"{torch.cuda.get_device_name(index)} is sm_{major}{minor} and this PyTorch "
            f"({torch.__version__}) is built for {', '.join(built_for)}: install one that has it"
        )
