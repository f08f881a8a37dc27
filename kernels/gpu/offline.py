"""Triton's host side without a card: what an engine launches, compiled into Triton's cache.

A launch on a card looks its kernel up by a key of its source, target, options and specialisation:
the types of the arguments, which pointers and integers are multiples of 16, which integers are 1.
So nothing is guessed here. The engine's own code launches, with tensors that have addresses and no
memory (`meta`), for a driver that says which card it is; Triton says what it would compile.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver

from gptjet.kernels.gpu.gemv_launch import assume_capability

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

_LAUNCHER = "__triton_launcher"
_UTILITIES = "cuda_utils"


# Beyond what a machine has of real ones.
_numbers = itertools.count(1000)


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel and what it is compiled for, as plain text for another process.

    specialization  Triton's own JSON of it, which `JITFunction.preload` takes
    """

    module: str
    kernel: str
    specialization: str
    capability: int


class PretendedCard:
    """What Triton asks of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._number = next(_numbers)

    def get_current_device(self) -> int:
        """A number of its own: kernels keep what they compiled for a device, and its target."""
        return self._number

    def get_current_stream(self, _: int) -> int:
        """There is none."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """As the driver of a card of that capability."""
        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def pretend(card: Any, capability: int) -> Iterator[None]:
    """Make `card` Triton's driver, and every device outside CUDA one of its capability."""
    before = driver._active  # `active` would look for a card
    driver.set_active(card)
    try:
        with assume_capability(capability):
            yield
    finally:
        driver._active = before


def record_launches(capability: int, run: Callable[[], None]) -> list[Launch]:
    """What `run` launches, each specialisation once. Nothing is compiled and nothing computed.

    The tensors must not be on a card; those of `meta` take no memory.
    """
    found: dict[Launch, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002 - Triton's name
        kernel: JITFunction[Any] = fn.jit_function
        launch = Launch(
            kernel.__module__, kernel.__name__, compile["specialization_data"], capability
        )
        found[launch] = None
        return True  # do not compile, do not launch

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        with pretend(PretendedCard(capability), capability):
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


def compile_launch(launch: Launch) -> str:
    """Compile it, and the C function that launches it, into Triton's cache; returns its hash.

    What is in the cache already is left. Raises what the compilers raise.
    """
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    with pretend(PretendedCard(launch.capability), launch.capability):
        compiled = kernel.preload(launch.specialization)
    constants = {
        (kernel.arg_names.index(at),) if isinstance(at, str) else at: value
        for at, value in compiled.src.constants.items()
    }
    described = getattr(compiled.metadata, "tensordesc_meta", None)
    _build_module(nvidia.make_launcher(constants, compiled.src.signature, described), _LAUNCHER)
    result: str = compiled.hash
    return result


def build_utilities() -> None:
    """Build what Triton's driver itself is made of into the cache: no card is needed for it."""
    source = Path(nvidia.dirname, "driver.c").read_text(encoding="utf-8")
    _build_module(source, _UTILITIES)


def _build_module(source: str, name: str) -> None:
    """Triton's `compile_module_from_src`, without loading the module: it needs a card's driver."""
    key = hashlib.sha256((source + build.platform_key()).encode()).hexdigest()
    cache = get_cache_manager(key)
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.c")
        path.write_text(source, encoding="utf-8")
        libraries = [nvidia.libdevice_dir, _stub_folder()]
        built = build._build(
            name, str(path), folder, libraries, nvidia.include_dirs, nvidia.libraries, []
        )
        cache.put(Path(built).read_bytes(), file, binary=True)


@functools.cache
def _stub_folder() -> str:
    """A folder with an empty libcuda.so.1 to link against; when it is loaded, the driver's is."""
    folder = tempfile.TemporaryDirectory(prefix="gptjet-libcuda-")
    _kept.append(folder)
    source = Path(folder.name, "empty.c")
    source.touch()
    compiler = os.environ.get("CC") or "cc"
    subprocess.run(
        [
            *compiler.split(),
            "-shared",
            "-fPIC",
            "-Wl,-soname,libcuda.so.1",
            "-o",
            str(Path(folder.name, "libcuda.so.1")),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    return folder.name


_kept: list[tempfile.TemporaryDirectory[str]] = []
