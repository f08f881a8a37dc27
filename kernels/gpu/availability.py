"""Whether the kernels can run on a card here, and what is in the way where they cannot.

Triton compiles a kernel for the card when it is first launched, and builds the function that
launches it with a C compiler and Python's headers. Both are kept in a folder (TRITON_CACHE_DIR, or
~/.triton/cache), so a machine whose cache was warmed needs neither.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from gptjet.kernels.gpu.compile_case import CAPABILITIES

MIN_CAPABILITY = min(CAPABILITIES)
"""Volta: what Triton compiles for, and the oldest that the kernels were."""


class KernelsUnavailableError(Exception):
    """The kernels cannot run here; the message says in one line why, and what would mend it."""


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What the first launch of a kernel needs, as far as a look tells.

    triton        its version, None where it is not installed
    compiler      of C, None where none is found
    has_headers   Python.h is where this Python says
    cache         the folder of compiled kernels
    num_cached    kernels in it
    """

    triton: str | None
    compiler: str | None
    has_headers: bool
    cache: Path
    num_cached: int

    @property
    def obstacles(self) -> tuple[tuple[str, str], ...]:
        """(problem, command that mends it) for what is missing."""
        found = []
        if self.triton is None:
            found.append(("Triton is not installed", "pip install 'gptjet[gpu]'"))
        if self.compiler is None:
            found.append(
                (
                    "no C compiler: Triton builds what launches a kernel with one",
                    "apt-get install -y gcc libc6-dev  # or set CC to a C compiler",
                )
            )
        if not self.has_headers:
            version = ".".join(platform.python_version_tuple()[:2])
            found.append(
                (
                    f"no Python headers: {_header()} is not there",
                    f"apt-get install -y python{version}-dev",
                )
            )
        return tuple(found)


def inspect_toolchain() -> Toolchain:
    """Look; nothing is imported, compiled or launched."""
    triton = metadata.version("triton") if util.find_spec("triton") is not None else None
    cache = cache_folder()
    cached = {path.parent for path in cache.glob("*/*.cubin")} if cache.is_dir() else set()
    return Toolchain(triton, find_compiler(), _header().is_file(), cache, len(cached))


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    chosen = os.environ.get("TRITON_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".triton" / "cache"


def find_compiler() -> str | None:
    """The C compiler that Triton takes: CC, else gcc, else clang."""
    chosen = os.environ.get("CC")
    if chosen:
        return shutil.which(chosen.split()[0])
    return shutil.which("gcc") or shutil.which("clang")


def check_capability(capability: int, name: str) -> str | None:
    """What to know about a card of that capability (75 for sm_75), None where it is one of ours.

    Raises KernelsUnavailableError for one that nothing can be compiled for.
    """
    ours = ", ".join(f"sm_{known}" for known in CAPABILITIES)
    if capability < MIN_CAPABILITY:
        raise KernelsUnavailableError(
            f"{name} is sm_{capability} and the kernels are for sm_{MIN_CAPABILITY} and newer "
            f"({ours}): PyTorch computes instead; --backend huggingface is the other choice"
        )
    if capability in CAPABILITIES:
        return None
    return (
        f"{name} is sm_{capability}, which the kernels are not tested for ({ours}): they are "
        f"compiled for it at first use, and parity is checked as everywhere"
    )


def check_launch(device: torch.device) -> None:
    """Compile and launch the smallest kernel. Raises KernelsUnavailableError with what failed."""
    try:
        computed = bool((launch_smallest(device) == 1).all())
    except Exception as error:
        raise KernelsUnavailableError(explain(error)) from error
    if not computed:
        raise KernelsUnavailableError("a kernel was launched on the card and computed nothing")


def launch_smallest(device: torch.device) -> torch.Tensor:
    """Launch the smallest kernel: float32 ones, where it computes. Raises what Triton raises."""
    from gptjet.kernels.gpu.embedding import embed

    ids = torch.zeros(1, dtype=torch.int32, device=device)
    row = torch.zeros(1, 16, device=device)
    embed(ids, ids - 1, ids, torch.ones(1, 16, dtype=torch.float16, device=device), row)
    return row


def explain(error: BaseException) -> str:
    """Why the first launch failed, in one line: what is missing, else the error itself."""
    toolchain = inspect_toolchain()
    builds = isinstance(error, (subprocess.CalledProcessError, OSError, ImportError))
    if toolchain.obstacles and (builds or "compiler" in str(error)):
        listed = "; ".join(f"{problem} ({mend})" for problem, mend in toolchain.obstacles)
        return f"the kernels cannot be built here: {listed}; or ship a warmed TRITON_CACHE_DIR"
    message = " ".join(str(error).split()) or "no message"
    return f"the first launch of a kernel failed: {type(error).__name__}: {message[:500]}"


def _header() -> Path:
    return Path(sysconfig.get_path("include")) / "Python.h"
