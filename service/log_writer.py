"""Writes log lines from a thread of its own: a log that cannot be written holds nobody up."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque

# Of lines that wait, when whatever reads the log is slow: half a minute of a busy server.
_MAX_WAITING_BYTES = 4 * 1024 * 1024
_FLUSH_S = 1.0


class BackgroundHandler(logging.Handler):
    """Formats where a line is logged, writes to a file descriptor from a daemon thread.

    Never blocks and never raises. What the descriptor does not take, as its disk is full or its
    reader has gone, is dropped and counted, and so is what is over the bound of waiting bytes; a
    line says how many, once lines are taken again.
    """

    def __init__(self, fd: int, max_waiting_bytes: int = _MAX_WAITING_BYTES) -> None:
        super().__init__()
        self.dropped = 0
        self._fd = fd
        self._max_waiting_bytes = max_waiting_bytes
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._is_writing = False
        self._is_closed = False
        self._changed = threading.Condition()
        # Of the writing thread alone.
        self._is_torn = False
        self._told_dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line, or drop it."""
        try:
            line = self._render(record)
        except Exception:  # noqa: BLE001 - whatever was logged cannot be shown; it is counted
            with self._changed:
                self.dropped += 1
            return
        with self._changed:
            if self._is_closed or self._waiting_bytes + len(line) > self._max_waiting_bytes:
                self.dropped += 1
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until the lines are written, for a second at most. For the end of a process."""
        end = time.monotonic() + _FLUSH_S
        with self._changed:
            while self._lines or self._is_writing:
                left_s = end - time.monotonic()
                if left_s <= 0 or not self._thread.is_alive():
                    return
                self._changed.wait(left_s)

    def close(self) -> None:
        """Flush and take no more lines."""
        self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        super().close()

    def _render(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + "\n").encode("utf-8", "backslashreplace")

    # --- the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                while not self._lines and not self._is_closed:
                    self._changed.wait()
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._waiting_bytes -= len(line)
                self._is_writing = True
                dropped = self.dropped
            if dropped > self._told_dropped and self._write(self._notice(dropped)):
                self._told_dropped = dropped
            if not self._write(line):
                with self._changed:
                    self.dropped += 1

    def _notice(self, dropped: int) -> bytes:
        message = "log lines were dropped: they could not be written, or not fast enough"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
        record.dropped = dropped - self._told_dropped
        return self._render(record)

    def _write(self, line: bytes) -> bool:
        left = memoryview(b"\n" + line if self._is_torn else line)
        while left:
            try:
                written = os.write(self._fd, left)
            except BlockingIOError:  # somebody has made it non-blocking
                select.select((), (self._fd,), ())
                continue
            except OSError:
                # Half a line is there: the next one begins anew.
                self._is_torn = self._is_torn or len(left) < len(line)
                return False
            left = left[written:]
        self._is_torn = False
        return True
