"""Device and dtype: chosen, or refused in one line that says what to do."""

from __future__ import annotations

import pytest
import torch

from gptjet.service.backends.device import (
    choose_device,
    choose_dtype,
    choose_weight_type,
    dtype_name,
)
from gptjet.service.engine.errors import BackendLoadError

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with one T4 and a PyTorch built for it, as PyTorch describes them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120"])
    return monkeypatch


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_in_fp32_without_a_gpu() -> None:
    assert choose_device("auto") == CPU
    assert choose_dtype("auto", CPU) is torch.float32


@pytest.mark.usefixtures("gpu")
def test_auto_is_the_gpu_in_fp16_with_one() -> None:
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == GPU
    assert choose_dtype("auto", GPU) is torch.float16


@pytest.mark.usefixtures("no_gpu")
def test_gpu_that_is_not_there_is_explained() -> None:
    with pytest.raises(BackendLoadError, match=r"cuda needs an NVIDIA GPU and .*or give cpu"):
        choose_device("cuda")


@pytest.mark.usefixtures("gpu")
def test_gpu_number_out_of_range_is_refused() -> None:
    with pytest.raises(BackendLoadError, match="no cuda:1: PyTorch sees 1 GPUs"):
        choose_device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cpu:0", ""])
def test_unknown_device_lists_the_known(name: str) -> None:
    with pytest.raises(BackendLoadError, match="give auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_gpu_without_machine_code_in_this_pytorch_is_refused(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 0))
    with pytest.raises(BackendLoadError, match=r"is sm_70 and this PyTorch .* sm_75, sm_80"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("capability", "arch_list"),
    [
        ((8, 6), ["sm_80"]),  # later of the same generation
        ((9, 0), ["sm_80", "compute_80"]),  # compiled by the driver from PTX
        ((12, 0), ["sm_120"]),
    ],
)
def test_gpu_that_older_code_runs_on_is_accepted(
    gpu: pytest.MonkeyPatch, capability: tuple[int, int], arch_list: list[str]
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    gpu.setattr(torch.cuda, "get_arch_list", lambda: arch_list)
    assert choose_device("cuda") == GPU


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_dtype_names_and_their_short_forms(name: str, dtype: torch.dtype) -> None:
    assert choose_dtype(name, CPU) is dtype
    assert choose_dtype(dtype_name(dtype), CPU) is dtype


def test_unknown_dtype_lists_the_known() -> None:
    with pytest.raises(
        BackendLoadError, match=r"unknown dtype 'fp8': give auto, float32 \(fp32\).*int8 or int4"
    ):
        choose_dtype("fp8", CPU)


def test_fp16_on_a_cpu_is_refused_with_the_alternatives() -> None:
    with pytest.raises(BackendLoadError, match="give float32 or bfloat16"):
        choose_dtype("float16", CPU)


@pytest.mark.usefixtures("gpu")
def test_bf16_on_an_old_gpu_is_refused_with_the_alternative() -> None:
    with pytest.raises(BackendLoadError, match=r"Tesla T4 has 7\.5; give float16"):
        choose_dtype("bfloat16", GPU)


def test_bf16_on_a_newer_gpu_is_accepted(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    assert choose_dtype("bf16", GPU) is torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantized_types_are_refused_where_only_floats_are_computed(name: str) -> None:
    with pytest.raises(BackendLoadError, match=f"{name} weights are for the fused backend"):
        choose_dtype(name, CPU)


@pytest.mark.parametrize(
    ("name", "weight_type"), [("auto", "float32"), ("fp32", "float32"), ("int8", "int8")]
)
def test_weight_type_is_a_dtype_or_a_quantized_one(name: str, weight_type: str) -> None:
    assert choose_weight_type(name, CPU) == weight_type


def test_quantized_checkpoint_chooses_its_own_type() -> None:
    assert choose_weight_type("auto", CPU, "int4") == choose_weight_type("int4", CPU, "int4")
    with pytest.raises(BackendLoadError, match="dtype float32 contradicts the checkpoint"):
        choose_weight_type("float32", CPU, "int4")
