"""Runs a command that ends with the process which started it, even one that is killed.

    python -m gptjet.service.die_with_parent PARENT_PID COMMAND ARGUMENT...

On Linux the kernel sends the command SIGTERM then (prctl(PR_SET_PDEATHSIG), which outlives exec);
elsewhere the command is merely run. Standard library only: it is started, never imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the command. Exits with 1 where the parent has ended already."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
