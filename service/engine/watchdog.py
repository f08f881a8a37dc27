"""Notices a step that does not end."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_TICKS_PER_TIMEOUT = 8
_LONGEST_TICK_S = 1.0


class Watchdog:
    """Calls `on_hung` once, from its own thread, if what `begin` announces is not ended in time.

    Time is counted in ticks that this thread has lived through, so a process that was stopped
    (SIGSTOP, a paused container, a suspended machine) is not taken for a hung one when it goes on.
    A step that never lets go of Python's global lock is not seen: nothing in the process runs then.
    """

    def __init__(self, timeout_s: float, on_hung: Callable[[str], None]) -> None:
        """`on_hung` is given the stack of the thread that `begin` was last called in."""
        self._timeout_s = timeout_s
        self._on_hung = on_hung
        # Odd while something runs. Only the watched thread writes it.
        self._count = 0
        self._watched: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gptjet-watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def begin(self) -> None:
        """Something begins that must end within the timeout."""
        self._watched = threading.get_ident()
        self._count += 1

    def end(self) -> None:
        """It has ended."""
        self._count += 1

    def stop(self) -> None:
        """Watch no more. Safe to call again, and before `start`."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        tick_s = min(_LONGEST_TICK_S, self._timeout_s / _TICKS_PER_TIMEOUT)
        seen, ticks = 0, 0
        while not self._stopped.wait(tick_s):
            count = self._count
            ticks = ticks + 1 if count == seen else 0
            seen = count
            if count % 2 and ticks * tick_s >= self._timeout_s:
                self._on_hung(self._stack())
                return

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._watched or 0)
        return "".join(traceback.format_stack(frame)) if frame else "(the thread has ended)"
