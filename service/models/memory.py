"""How much memory a model may take on this machine."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Host memory that can be had without swapping: the machine's, or less inside a container.

    `cgroup` is the cgroup v2 folder of this container. Page cache counts as available, because the
    kernel gives it up.
    """
    available = _machine_bytes(meminfo)
    limit = _read_bytes(cgroup / "memory.max")
    used = _read_bytes(cgroup / "memory.current")
    if limit is None or used is None:
        return available
    idle_page_cache = _field(cgroup / "memory.stat", "inactive_file") or 0
    return max(0, min(available, limit - used + idle_page_cache))


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    It keeps what a model's loading has freed, some tens of MiB, for allocations to come.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def format_bytes(count: float) -> str:
    """`count` bytes as people read them: "11.3 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _read_bytes(path: Path) -> int | None:
    """The number in the file; None for "max" and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _machine_bytes(meminfo: Path) -> int:
    kib = _field(meminfo, "MemAvailable:")
    if kib is not None:
        return kib * 1024
    # Not Linux: free memory without page cache, which is less than there is.
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _field(path: Path, name: str) -> int | None:
    """The number after `name` on its line; None where there is no such file or line."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words and words[0] == name:
            return int(words[1])
    return None
