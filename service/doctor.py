"""Is this machine able to run each backend, and if not, what mends it: the facts behind
`gptjet doctor`."""

from __future__ import annotations

import enum
import platform
import shlex
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from gptjet.kernels.cpu import NativeUnavailableError
from gptjet.kernels.cpu.build import chosen_isa, find_compiler
from gptjet.kernels.gpu.availability import (
    KernelsUnavailableError,
    check_capability,
    first_start_note,
    inspect_toolchain,
)
from gptjet.service.backends.deepspeed import guards, op_build
from gptjet.service.backends.deepspeed.op_build import OpReport, OpState
from gptjet.service.backends.deepspeed.toolchain import OP_NAME
from gptjet.service.backends.device import dtype_name
from gptjet.service.backends.threads import choose_cpu_threads
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.memory import available_host_bytes, format_bytes

_PACKAGES = ("torch", "transformers", "deepspeed", "triton", "grpcio")


class Health(enum.StrEnum):
    """How a check came out. WARNING: it works, after a wait or not at its best."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report. `mend` holds the commands that remove what is in the way."""

    name: str
    health: Health
    summary: str
    details: tuple[str, ...] = ()
    mend: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Every check, and which backends can be served here."""

    checks: tuple[Check, ...]
    backends: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def examine() -> Diagnosis:
    """Look at this machine. Nothing is downloaded, compiled or loaded."""
    gpu = check_gpu()
    op = check_deepspeed(op_build.inspect(), gpu)
    checks = (check_packages(), check_host(), check_kernels(), gpu, check_gpu_kernels(), op)
    backends = ["fused", "huggingface"]
    if op.health is not Health.FAILED:
        backends.append("deepspeed")
    return Diagnosis(checks, tuple(backends))


def check_packages() -> Check:
    """The versions a bug report needs."""
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    details = (f"not installed: {', '.join(missing)}",) if missing else ()
    return Check(
        "packages", Health.OK, f"Python {platform.python_version()}, {', '.join(found)}", details
    )


def check_host() -> Check:
    """Processor cores and the memory that can be had without swapping."""
    threads = choose_cpu_threads()
    summary = f"{threads} threads, {format_bytes(available_host_bytes())} available"
    return Check("host", Health.OK, summary)


def check_kernels() -> Check:
    """What the fused backend's CPU kernels are compiled with, where a compiler is found."""
    try:
        isa = chosen_isa()
        compiler = shlex.join(find_compiler())
    except NativeUnavailableError as error:
        return Check(
            "fused on a CPU",
            Health.WARNING,
            f"PyTorch computes, at a fraction of the speed: {error}",
            mend=("apt-get install -y gcc libc6-dev  # or set CC to a C compiler",),
        )
    return Check(
        "fused on a CPU", Health.OK, f"kernels for the {isa} processor, compiled by {compiler}"
    )


def check_gpu() -> Check:
    """The first GPU, if PyTorch sees one and DeepSpeed's kernels and FP16 run on it."""
    if not torch.cuda.is_available():
        reason = (
            "PyTorch sees no NVIDIA GPU"
            if torch.version.cuda
            else f"this PyTorch ({torch.__version__}) is built without CUDA"
        )
        mend = ("nvidia-smi  # does the driver answer?",) if torch.version.cuda else ()
        return Check("gpu", Health.WARNING, f"{reason}: the CPU serves, slowly", mend=mend)
    try:
        device = torch.device("cuda", torch.cuda.current_device())
        card = guards.cuda_platform(device, torch.float16)
    except BackendLoadError as error:
        return Check("gpu", Health.WARNING, str(error))
    capability = card.capability or (0, 0)
    free = format_bytes(card.free_bytes())
    total = format_bytes(torch.cuda.get_device_properties(device).total_memory)
    return Check(
        "gpu",
        Health.OK,
        f"{card.name}, sm_{capability[0]}{capability[1]}, {free} of {total} free, driver "
        f"{driver_version()}",
        (f"serves in {dtype_name(card.dtype)}",),
    )


def check_gpu_kernels() -> Check:
    """Whether the fused backend's GPU kernels can be built, for the card that is there."""
    toolchain = inspect_toolchain()
    where = f"{toolchain.num_cached} compiled kernels in {toolchain.cache}"
    if not torch.cuda.is_available():
        return Check("fused on a GPU", Health.OK, "there is no GPU to run its kernels on", (where,))
    card = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    try:
        note = check_capability(10 * major + minor, card)
    except KernelsUnavailableError as error:
        return Check("fused on a GPU", Health.WARNING, str(error))
    problems = toolchain.obstacles
    if problems:
        # A warmed cache needs no compiler and no headers; nothing here can tell what is in it.
        works = toolchain.triton is not None and toolchain.num_cached > 0
        listed = "; ".join(problem for problem, _ in problems)
        summary = (
            f"{listed}: only kernels that are compiled already can run"
            if works
            else f"PyTorch computes, at a fraction of the speed: {listed}"
        )
        mend = tuple(f"{command}  # {problem}" for problem, command in problems)
        return Check("fused on a GPU", Health.WARNING, summary, (where,), mend)
    summary = f"Triton {toolchain.triton} compiles kernels for sm_{major}{minor} at first use"
    notes = (note, first_start_note(10 * major + minor, toolchain))
    details = (where, *filter(None, notes))
    return Check("fused on a GPU", Health.OK, summary, details)


def check_deepspeed(report: OpReport, gpu: Check) -> Check:
    """DeepSpeed's op, and a card to run it on."""
    mend = tuple(f"{obstacle.command}  # {obstacle.problem}" for obstacle in report.obstacles)
    summary = f"the {OP_NAME} op {_STATE_WORDS[report.state]}"
    if report.state is OpState.IMPOSSIBLE:
        return Check("deepspeed", Health.FAILED, summary, report.facts, mend)
    if gpu.health is not Health.OK:
        return Check(
            "deepspeed", Health.FAILED, f"{summary}, but there is no GPU to run it on", report.facts
        )
    health = Health.OK if report.state is OpState.PREBUILT else Health.WARNING
    return Check("deepspeed", health, summary, report.facts)


def driver_version() -> str:
    """The NVIDIA driver's, "unknown" where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else "unknown"


_STATE_WORDS = {
    OpState.PREBUILT: "is prebuilt",
    OpState.JIT: "will be built at first use (minutes)",
    OpState.IMPOSSIBLE: "cannot be had here",
}
