"""A competing process on each core: a machine that somebody else uses too."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# Bound to its core, and gone with the process that started it, however that ends.
_SPIN = (
    "import ctypes, os, signal, sys\n"
    "core, parent = int(sys.argv[1]), int(sys.argv[2])\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)\n"
    "    if os.getppid() != parent: sys.exit(1)\n"
    "    os.sched_setaffinity(0, {core})\n"
    "print('spinning', flush=True)\n"
    "while True: pass\n"
)


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def busy_cores() -> Iterator[list[int]]:
    """Keep every usable core busy with one process each; yields their ids once all of them run."""
    with contextlib.ExitStack() as stack:
        processes = []
        for core in usable_cores():
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-S", "-c", _SPIN, str(core), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                )
            )
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield [process.pid for process in processes]
