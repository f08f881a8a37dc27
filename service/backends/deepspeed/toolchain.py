"""What a build of DeepSpeed's op would find on this machine. Nothing is compiled, no GPU
initialised."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path

import torch

from gptjet.service.backends.deepspeed.runtime import deepspeed_installed, quiet_deepspeed

OP_NAME = "transformer_inference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """What a build would use, read from the machine. None where it is missing.

    capability       of the card, None without one
    prebuilt         the op is part of the installed package
    torch_version, torch_cuda    of the PyTorch that would load the op
    built_torch, built_cuda      of the PyTorch a prebuilt op was compiled against
    architectures_in_op          machine code in a prebuilt op; empty where cuobjdump is missing
    wheel_cuda       the CUDA libraries that pip installed beside PyTorch
    arch_list        TORCH_CUDA_ARCH_LIST
    """

    deepspeed: str | None
    prebuilt: bool = False
    built_torch: str = ""
    built_cuda: str = ""
    torch_version: str = torch.__version__
    torch_cuda: str | None = None
    capability: tuple[int, int] | None = None
    cuda_home: Path | None = None
    nvcc_version: tuple[int, int] | None = None
    cxx: str | None = None
    cxx_major: int | None = None
    has_ninja: bool = False
    has_cublas_header: bool = False
    has_curand_library: bool = False
    wheel_cuda: Path | None = None
    arch_list: str = ""
    architectures_in_op: tuple[tuple[int, int], ...] = ()


def read_toolchain(environment: Mapping[str, str] | None = None) -> Toolchain:
    """Look the machine over. No GPU context is made and nothing is compiled."""
    env = os.environ if environment is None else environment
    cuda_home = _cuda_home(env)
    wheel_cuda = _wheel_cuda()
    cxx = env.get("CXX") or shutil.which("g++") or shutil.which("c++")
    built = _build_record()
    return Toolchain(
        deepspeed=metadata.version("deepspeed") if deepspeed_installed() else None,
        prebuilt=built.get("prebuilt") == "yes",
        built_torch=built.get("torch", ""),
        built_cuda=built.get("cuda", ""),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        capability=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        cuda_home=cuda_home,
        nvcc_version=_nvcc_version(cuda_home),
        cxx=cxx,
        cxx_major=_first_number(_output(cxx, "-dumpversion")) if cxx else None,
        has_ninja=bool(shutil.which("ninja") or util.find_spec("ninja")),
        has_cublas_header=_on_path(
            "cublas_v2.h", cuda_home, ("include",), env.get("CPLUS_INCLUDE_PATH", "")
        ),
        has_curand_library=_on_path(
            "libcurand.so",
            cuda_home,
            ("lib64", "lib", "targets/x86_64-linux/lib"),
            env.get("LIBRARY_PATH", "") + ":/usr/lib/x86_64-linux-gnu:/usr/lib64",
        ),
        wheel_cuda=wheel_cuda,
        arch_list=env.get("TORCH_CUDA_ARCH_LIST", ""),
        architectures_in_op=_architectures_in_op() if built.get("prebuilt") == "yes" else (),
    )


def _build_record() -> dict[str, str]:
    """What DeepSpeed's own build wrote down: is the op in this package, and for which torch."""
    try:
        with quiet_deepspeed():
            record = import_module("deepspeed.git_version_info_installed")
    except Exception:  # noqa: BLE001 - whatever its import stumbles over, there is no record
        return {}
    info = record.torch_info
    has_op = record.installed_ops.get(OP_NAME) and record.accelerator_name == "cuda"
    return {
        "prebuilt": "yes" if has_op else "no",
        "torch": str(info.get("version", "")),
        "cuda": "" if info.get("cuda_version") in (None, "0.0") else str(info["cuda_version"]),
    }


def _architectures_in_op() -> tuple[tuple[int, int], ...]:
    """GPU generations with machine code in the prebuilt op, by cuobjdump where there is one."""
    spec = util.find_spec(f"deepspeed.ops.transformer.inference.{OP_NAME}_op")
    tool = shutil.which("cuobjdump")
    if spec is None or spec.origin is None or tool is None:
        return ()
    listing = _output(tool, "--list-elf", spec.origin)
    return tuple(sorted({(int(a), int(b)) for a, b in re.findall(r"sm_(\d+)(\d)\b", listing)}))


def _cuda_home(env: Mapping[str, str]) -> Path | None:
    named = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc:
        return Path(nvcc).resolve().parent.parent
    default = Path("/usr/local/cuda")
    return default if default.is_dir() else None


def _nvcc_version(cuda_home: Path | None) -> tuple[int, int] | None:
    nvcc = cuda_home / "bin" / "nvcc" if cuda_home else None
    if nvcc is None or not nvcc.is_file():
        return None
    match = re.search(r"release (\d+)\.(\d+)", _output(str(nvcc), "-V"))
    return (int(match[1]), int(match[2])) if match else None


def _wheel_cuda() -> Path | None:
    """The folder of the CUDA that pip installed beside PyTorch, if any."""
    spec = util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    return next((folder for root in roots for folder in sorted(root.glob("cu1[0-9]"))), None)


def _on_path(name: str, home: Path | None, folders: tuple[str, ...], path: str) -> bool:
    places = [home / folder for folder in folders] if home else []
    places += [Path(entry) for entry in path.split(":") if entry]
    return any((place / name).exists() for place in places)


def _first_number(text: str) -> int | None:
    match = re.search(r"\d+", text)
    return int(match[0]) if match else None


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout
