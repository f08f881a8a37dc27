"""The fused engine's CPU kernels: a small C library, compiled where it runs, and its model."""

from __future__ import annotations

from gptjet.kernels.cpu.build import NativeUnavailableError
from gptjet.kernels.cpu.library import Library, native_library
from gptjet.kernels.cpu.model import CpuModel

__all__ = ["CpuModel", "Library", "NativeUnavailableError", "native_library"]
