"""What the doctor says of DeepSpeed's op on machines that are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.backends.deepspeed import op_build
from gptjet.service.backends.deepspeed.op_build import OpState
from gptjet.service.backends.deepspeed.toolchain import Toolchain, read_toolchain
from gptjet.service.engine.errors import BackendLoadError

T4 = (7, 5)
V100 = (7, 0)
H100 = (9, 0)

COMPLETE = Toolchain(
    deepspeed="0.19.8",
    torch_version="2.10.0+cu126",
    torch_cuda="12.6",
    capability=T4,
    cuda_home=Path("/usr/local/cuda"),
    nvcc_version=(12, 6),
    cxx="/usr/bin/g++",
    cxx_major=12,
    has_ninja=True,
    has_cublas_header=True,
    has_curand_library=True,
)


def obstacles(**changes: Any) -> list[tuple[str, str]]:
    report = op_build.inspect(replace(COMPLETE, **changes))
    assert (report.state is OpState.IMPOSSIBLE) == bool(report.obstacles)
    return [(obstacle.problem, obstacle.command) for obstacle in report.obstacles]


def test_complete_toolchain_builds_at_first_use_and_says_how_to_build_before() -> None:
    report = op_build.inspect(COMPLETE)
    assert report.state is OpState.JIT
    assert any('TORCH_CUDA_ARCH_LIST="7.5+PTX" pip install' in fact for fact in report.facts)
    op_build.check_loadable(report)


@pytest.mark.parametrize(
    ("changes", "problem", "command"),
    [
        (
            {"deepspeed": None},
            "deepspeed package is missing",
            "--no-build-isolation 'gptjet[deepspeed]'",
        ),
        ({"torch_cuda": None}, "no CUDA", "pip install -r requirements/t4-v100-a10.txt"),
        (
            {"nvcc_version": None, "cuda_home": None},
            "no CUDA compiler: CUDA_HOME is not set",
            "apt-get install -y cuda-toolkit-12-6 && export CUDA_HOME=/usr/local/cuda-12.6",
        ),
        ({"nvcc_version": (11, 8)}, "nvcc is 11.8 and PyTorch's CUDA is 12.6", "cuda-toolkit-12-6"),
        ({"cxx": None}, "no C++ compiler", "apt-get install -y g++"),
        ({"cxx_major": 7}, "version 7", "export CXX=g++-9"),
        ({"has_ninja": False}, "ninja is missing", "pip install ninja"),
        ({"has_cublas_header": False}, "cublas_v2.h", "apt-get install -y libcublas-dev-12-6"),
        ({"has_curand_library": False}, "libcurand.so", "apt-get install -y libcurand-dev-12-6"),
        (
            {"arch_list": "6.0;6.1;8.0"},
            "'6.0;6.1;8.0' and the card is 7.5",
            'export TORCH_CUDA_ARCH_LIST="7.5+PTX"',
        ),
        (
            {"capability": V100, "nvcc_version": (13, 0), "torch_cuda": "13.0"},
            "no longer compiles for sm_70",
            "docker build --target deepspeed-sm70-sm75",
        ),
        ({"capability": None}, "no GPU is visible", 'TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;9.0+PTX"'),
    ],
)
def test_each_obstacle_is_named_with_the_command_that_mends_it(
    changes: dict[str, Any], problem: str, command: str
) -> None:
    found = obstacles(**changes)
    assert len(found) == 1
    assert problem in found[0][0]
    assert command in found[0][1]


def test_wheels_headers_and_libraries_are_used_where_pip_brought_them(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cublas_v2.h").touch()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcurand.so.10").touch()
    found = dict(obstacles(wheel_cuda=tmp_path, has_cublas_header=False, has_curand_library=False))
    commands = " ".join(found.values())
    assert f"CPLUS_INCLUDE_PATH={tmp_path}/include:" in commands
    assert f"ln -sf {tmp_path}/lib/libcurand.so.10 " in commands


def test_everything_missing_is_listed_at_once() -> None:
    found = obstacles(cxx=None, has_ninja=False, has_cublas_header=False, arch_list="6.0")
    assert len(found) == 4


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"torch_version": "2.10.0"}, "prebuilt for torch 2.11 and torch is 2.10.0"),
        ({"torch_cuda": "12.8"}, "prebuilt for CUDA 13.0 and PyTorch has 12.8"),
        ({"architectures_in_op": (H100,)}, "the op holds sm_90 and the card is sm_75"),
    ],
)
def test_prebuilt_op_that_does_not_fit_is_rebuilt_not_trusted(
    changes: dict[str, Any], problem: str
) -> None:
    prebuilt: dict[str, Any] = {
        "prebuilt": True,
        "built_torch": "2.11",
        "built_cuda": "13.0",
        "torch_version": "2.11.0+cu130",
        "torch_cuda": "13.0",
        "architectures_in_op": (T4, H100),
    }
    assert op_build.inspect(replace(COMPLETE, **prebuilt)).state is OpState.PREBUILT
    found = obstacles(**prebuilt | changes)
    assert len(found) == 1
    assert problem in found[0][0]
    assert "DS_BUILD_TRANSFORMER_INFERENCE=1" in found[0][1]


def test_prebuilt_op_needs_no_compiler() -> None:
    report = op_build.inspect(
        replace(
            COMPLETE,
            prebuilt=True,
            built_torch="2.10",
            built_cuda="12.6",
            nvcc_version=None,
            cxx=None,
        )
    )
    assert report.state is OpState.PREBUILT


def test_load_is_refused_with_the_first_command_and_the_number_of_others() -> None:
    report = op_build.inspect(replace(COMPLETE, cxx=None, has_ninja=False))
    with pytest.raises(
        BackendLoadError, match=r"\(and 1 more\).*apt-get install -y g\+\+"
    ) as error:
        op_build.check_loadable(report)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arch_list", "capability", "covered"),
    [
        ("7.5", T4, True),
        ("6.0;6.1;7.0", T4, True),  # sm_70 code runs on sm_75
        ("6.0 6.1", T4, False),
        ("6.0 6.1+PTX", T4, True),
        ("8.0;9.0+PTX", T4, False),
        ("8.0", (8, 6), True),
        ("9.0a", H100, True),
        ("", T4, False),
    ],
)
def test_arch_list_covers_a_card_by_machine_code_or_ptx(
    arch_list: str, capability: tuple[int, int], covered: bool
) -> None:
    assert op_build.covers(arch_list, capability) is covered


def test_minor_versions_of_cuda_12_may_differ() -> None:
    assert obstacles(nvcc_version=(12, 4)) == []


def test_this_machine_can_be_read_without_a_gpu_or_a_context() -> None:
    toolchain = read_toolchain({})
    assert toolchain.deepspeed is not None
    assert toolchain.prebuilt is False
