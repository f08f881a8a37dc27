"""How many processor cores a model may keep busy."""

from __future__ import annotations

import os
from pathlib import Path

# What the CPU kernels take (kernels.cpu.model.MAX_THREADS); a decode step gains nothing from more.
_MAX_THREADS = 256
_CGROUP = Path("/sys/fs/cgroup")


def choose_cpu_threads(setting: int | None = None, cgroup: Path = _CGROUP) -> int:
    """`setting`, else OMP_NUM_THREADS, else one for each core that this process may use.

    Those are what affinity and a container's quota leave; `cgroup` is the container's cgroup v2
    folder. A quota of 2.5 cores is 2 threads: a third would be stopped for half of each period, and
    the others wait for it at every layer.
    """
    if setting is not None:
        return setting
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    quota = _quota(cgroup / "cpu.max")
    return max(1, min(cores, _MAX_THREADS, cores if quota is None else int(quota)))


def _quota(path: Path) -> float | None:
    """Cores that "200000 100000" (microseconds of every so many) allows; None for no limit."""
    try:
        allowed, period = path.read_text().split()
        return int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
