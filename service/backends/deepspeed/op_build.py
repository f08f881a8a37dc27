"""DeepSpeed's compiled op: is it prebuilt, will it be built at first use, or can it not be, and
why.

DeepSpeed itself says "not compatible" and little else. Every obstacle found while building it
stands here as a check with the command that removes it. Nothing is compiled and no GPU is
initialised.
"""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass

from gptjet.service.backends.deepspeed.runtime import INSTALL_COMMAND
from gptjet.service.backends.deepspeed.toolchain import OP_NAME, Toolchain, read_toolchain
from gptjet.service.engine.errors import BackendLoadError

_MIN_GCC = 9  # C++17 as PyTorch's headers use it
# CUDA 13 dropped Maxwell, Pascal and Volta from nvcc.
_OLDEST_CAPABILITY_OF_CUDA = {12: (5, 0), 13: (7, 5)}


class OpState(enum.StrEnum):
    """Whether DeepSpeed's inference op can be had here."""

    PREBUILT = "prebuilt"
    JIT = "will be built at first use"
    IMPOSSIBLE = "cannot be had"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing in the way of the op, and the exact command that mends it."""

    problem: str
    command: str


@dataclass(frozen=True, slots=True)
class OpReport:
    """What was found. `facts` are lines for a person; `obstacles` is empty unless IMPOSSIBLE."""

    state: OpState
    facts: tuple[str, ...]
    obstacles: tuple[Obstacle, ...] = ()


def inspect(toolchain: Toolchain | None = None) -> OpReport:
    """Judge the machine's toolchain (or the one given)."""
    found = toolchain or read_toolchain()
    if found.deepspeed is None:
        return OpReport(
            OpState.IMPOSSIBLE,
            ("deepspeed is not installed",),
            (Obstacle("the deepspeed package is missing", INSTALL_COMMAND),),
        )
    facts = [f"deepspeed {found.deepspeed}, torch {found.torch_version}"]
    if found.torch_cuda is None:
        return OpReport(
            OpState.IMPOSSIBLE,
            (*facts, "this PyTorch is built without CUDA, and the op is CUDA only"),
            (
                Obstacle(
                    "PyTorch has no CUDA",
                    "pip install -r requirements/t4-v100-a10.txt  # hopper.txt on an H100",
                ),
            ),
        )
    facts.append(f"PyTorch's CUDA is {found.torch_cuda}")
    if found.prebuilt:
        return _judge_prebuilt(found, facts)
    return _judge_toolchain(found, facts)


def check_loadable(report: OpReport | None = None) -> None:
    """Raise BackendLoadError, with the mending command, where the op cannot be had."""
    found = report or inspect()
    if found.state is OpState.IMPOSSIBLE:
        first = found.obstacles[0]
        more = f" (and {len(found.obstacles) - 1} more)" if len(found.obstacles) > 1 else ""
        raise BackendLoadError(
            f"DeepSpeed's {OP_NAME} op cannot be had here: {first.problem}{more}; "
            f"mend it with: {first.command}; `gptjet doctor` has the whole list"
        )


def build_command(capability: tuple[int, int] | None, version: str) -> str:
    """The command that compiles the op into DeepSpeed, for the card at hand or for every one."""
    arch = f"{capability[0]}.{capability[1]}" if capability else "7.5;8.0;8.6;9.0"
    return (
        f"DS_BUILD_OPS=0 DS_BUILD_TRANSFORMER_INFERENCE=1 DS_ACCELERATOR=cuda "
        f'TORCH_CUDA_ARCH_LIST="{arch}+PTX" pip install --force-reinstall --no-deps '
        f"--no-build-isolation --no-cache-dir --no-binary deepspeed deepspeed=={version}"
    )


def _judge_prebuilt(found: Toolchain, facts: list[str]) -> OpReport:
    obstacles = []
    rebuild = build_command(found.capability, found.deepspeed or "")
    if not found.torch_version.startswith(found.built_torch + "."):
        obstacles.append(
            Obstacle(
                f"the op is prebuilt for torch {found.built_torch} and torch is "
                f"{found.torch_version}",
                rebuild,
            )
        )
    if found.built_cuda and found.built_cuda != found.torch_cuda:
        obstacles.append(
            Obstacle(
                f"the op is prebuilt for CUDA {found.built_cuda} and PyTorch has "
                f"{found.torch_cuda}",
                rebuild,
            )
        )
    built_for = found.architectures_in_op
    card = found.capability
    if built_for and card and not any(a[0] == card[0] and a[1] <= card[1] for a in built_for):
        names = ", ".join(f"sm_{major}{minor}" for major, minor in built_for)
        if max(built_for) > card:
            obstacles.append(
                Obstacle(f"the op holds {names} and the card is sm_{card[0]}{card[1]}", rebuild)
            )
        else:
            facts.append(f"the op holds {names}; its PTX is compiled for this card at first use")
    if obstacles:
        return OpReport(OpState.IMPOSSIBLE, (*facts, "the op is prebuilt"), tuple(obstacles))
    return OpReport(OpState.PREBUILT, (*facts, "the op is prebuilt and fits this PyTorch"))


def _judge_toolchain(found: Toolchain, facts: list[str]) -> OpReport:
    obstacles = [
        *_compiler_obstacles(found),
        *_header_obstacles(found),
        *_architecture_obstacles(found),
    ]
    nvcc = found.nvcc_version
    facts.append(
        f"nvcc {nvcc[0]}.{nvcc[1]} in {found.cuda_home}"
        if nvcc
        else "there is no nvcc to build with"
    )
    if obstacles:
        return OpReport(OpState.IMPOSSIBLE, tuple(facts), tuple(obstacles))
    facts.append("the op is not prebuilt: the first start compiles it, which takes minutes")
    card = found.capability
    if found.arch_list and card and f"{card[0]}.{card[1]}" not in found.arch_list:
        facts.append(
            f"TORCH_CUDA_ARCH_LIST {found.arch_list!r} has no {card[0]}.{card[1]} of this card's "
            "own"
        )
    facts.append(f"to have it beforehand: {build_command(found.capability, found.deepspeed or '')}")
    return OpReport(OpState.JIT, tuple(facts))


def _compiler_obstacles(found: Toolchain) -> list[Obstacle]:
    obstacles = []
    cuda = found.torch_cuda or ""
    package = "cuda-toolkit-" + "-".join(cuda.split(".")[:2])
    if found.nvcc_version is None:
        obstacles.append(
            Obstacle(
                f"no CUDA compiler: CUDA_HOME is {found.cuda_home or 'not set'} and has no nvcc",
                f"apt-get install -y {package} && export CUDA_HOME=/usr/local/cuda-{cuda}",
            )
        )
    elif not _cuda_matches(found.nvcc_version, cuda):
        installed = f"{found.nvcc_version[0]}.{found.nvcc_version[1]}"
        obstacles.append(
            Obstacle(
                f"nvcc is {installed} and PyTorch's CUDA is {cuda}, which DeepSpeed refuses to mix",
                f"apt-get install -y {package} && export CUDA_HOME=/usr/local/cuda-{cuda}",
            )
        )
    if found.cxx is None:
        obstacles.append(Obstacle("no C++ compiler (g++)", "apt-get install -y g++"))
    elif found.cxx_major is not None and found.cxx_major < _MIN_GCC:
        obstacles.append(
            Obstacle(
                f"{found.cxx} is version {found.cxx_major}; PyTorch's headers need {_MIN_GCC}",
                f"apt-get install -y g++-{_MIN_GCC} && export CXX=g++-{_MIN_GCC}",
            )
        )
    if not found.has_ninja:
        obstacles.append(Obstacle("ninja is missing", "pip install ninja"))
    return obstacles


def _header_obstacles(found: Toolchain) -> list[Obstacle]:
    """A CUDA that pip installed has the compiler and not always the libraries' headers."""
    if found.nvcc_version is None:
        return []
    obstacles = []
    wheel = found.wheel_cuda
    if not found.has_cublas_header:
        command = (
            f"export CPLUS_INCLUDE_PATH={wheel / 'include'}:$CPLUS_INCLUDE_PATH"
            if wheel and (wheel / "include" / "cublas_v2.h").is_file()
            else f"apt-get install -y libcublas-dev-{'-'.join(map(str, found.nvcc_version))}"
        )
        obstacles.append(
            Obstacle(
                f"cublas_v2.h is not in {found.cuda_home}/include nor on CPLUS_INCLUDE_PATH",
                command,
            )
        )
    if not found.has_curand_library:
        shared = next(iter(sorted((wheel / "lib").glob("libcurand.so.*"))), None) if wheel else None
        command = (
            "mkdir -p ~/.local/lib && "
            f"ln -sf {shared} ~/.local/lib/libcurand.so && "
            "export LIBRARY_PATH=~/.local/lib:$LIBRARY_PATH"
            if shared
            else f"apt-get install -y libcurand-dev-{'-'.join(map(str, found.nvcc_version))}"
        )
        obstacles.append(
            Obstacle(
                "the linker finds no libcurand.so (wheels carry libcurand.so.10 only)", command
            )
        )
    return obstacles


def _architecture_obstacles(found: Toolchain) -> list[Obstacle]:
    obstacles = []
    card, nvcc = found.capability, found.nvcc_version
    if card is None:
        # without one, DeepSpeed's build at first use passes nvcc no arguments and gelu.cu fails
        obstacles.append(
            Obstacle(
                "no GPU is visible, and a build at first use needs one; built beforehand the op "
                "needs none",
                build_command(None, found.deepspeed or ""),
            )
        )
        return obstacles
    name = f"{card[0]}.{card[1]}"
    if nvcc and card < _OLDEST_CAPABILITY_OF_CUDA.get(nvcc[0], (0, 0)):
        obstacles.append(
            Obstacle(
                f"nvcc {nvcc[0]}.{nvcc[1]} no longer compiles for sm_{card[0]}{card[1]}",
                "docker build --target deepspeed-sm70-sm75 .  (CUDA 12.6, torch 2.10.0)",
            )
        )
    if found.arch_list and not covers(found.arch_list, card):
        obstacles.append(
            Obstacle(
                f"TORCH_CUDA_ARCH_LIST is {found.arch_list!r} and the card is {name}",
                f'export TORCH_CUDA_ARCH_LIST="{name}+PTX"',
            )
        )
    return obstacles


def covers(arch_list: str, capability: tuple[int, int]) -> bool:
    """Whether code built for `arch_list` ("7.0 7.5+PTX") runs on a card of `capability`."""
    for entry in re.split(r"[;\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)[af]?(\+PTX)?", entry)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        if built[0] == capability[0] and built[1] <= capability[1]:
            return True
        if match[3] and built <= capability:
            return True
    return False


def _cuda_matches(nvcc: tuple[int, int], torch_cuda: str) -> bool:
    """DeepSpeed accepts another minor version within CUDA 10, 11 and 12, and nothing else."""
    major, minor = (int(part) for part in torch_cuda.split(".")[:2])
    same_family = nvcc[0] == major and major in (10, 11, 12)
    skipped = os.environ.get("DS_SKIP_CUDA_CHECK") == "1"
    return nvcc == (major, minor) or same_family or skipped
