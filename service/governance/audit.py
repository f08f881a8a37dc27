"""The audit log: JSON lines, only ever appended to, rotated by size.

A crash can leave a last line without an end. It is kept as it is, ended, and said to be torn by the
next line; a reader skips lines that are no JSON. Two processes may append to one log (an upgrade
under load): a line is one write, and a file that was rotated by the other is let go of.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

Fsync = Literal["always", "second", "never"]
_SYNC_EVERY_S = 1.0
_LOCK_SUFFIX = ".lock"


class AuditLog:
    """Appends records to a file; for one thread.

    max_bytes  a file that would grow past it becomes `<name>.1`, that `<name>.2`, and so on
    keep       how many files there are, the current one included; older ones are removed
    fsync      when lines are on the disk for certain: at once, within a second, or when the system
               writes them
    """

    def __init__(self, path: Path, *, max_bytes: int, keep: int, fsync: Fsync) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._fsync = fsync
        self._descriptor: int | None = None
        self._unsynced_since: float | None = None

    def append(self, records: Iterable[Mapping[str, object]]) -> None:
        """Write one line a record. Raises OSError; a line is whole, or is torn and ended later."""
        for record in records:
            line = _line(record)
            descriptor = self._current(len(line))
            written = os.write(descriptor, line)
            if written < len(line):
                # The disk is full to the byte. The rest may be refused with the reason.
                self._finish_write(descriptor, line[written:])
            if self._unsynced_since is None:
                self._unsynced_since = time.monotonic()
        if self._fsync == "always":
            self.sync()

    def sync(self, *, if_due: bool = False) -> None:
        """Bring what was written to the disk. Raises OSError."""
        since = self._unsynced_since
        if since is None or self._descriptor is None:
            return
        if if_due and (self._fsync == "never" or time.monotonic() - since < _SYNC_EVERY_S):
            return
        os.fsync(self._descriptor)
        self._unsynced_since = None

    def close(self) -> None:
        """Sync and close; safe to call again."""
        descriptor = self._descriptor
        if descriptor is not None:
            with contextlib.suppress(OSError):
                if self._fsync != "never":
                    self.sync()
            self._let_go()

    def _current(self, size: int) -> int:
        """The descriptor to write `size` bytes to, its last line ended."""
        if self._descriptor is not None and self._was_replaced(self._descriptor):
            self._let_go()
        if self._descriptor is None:
            self._descriptor = self._open()
        length = os.fstat(self._descriptor).st_size
        if length and length + size > self._max_bytes:
            self._rotate()
            self._descriptor = self._open()
        self._end_torn_line(self._descriptor)
        return self._descriptor

    def _open(self) -> int:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_APPEND | os.O_CREAT | os.O_RDWR | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def _was_replaced(self, descriptor: int) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(descriptor))

    def _let_go(self) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor, self._unsynced_since = None, None

    def _end_torn_line(self, descriptor: int) -> None:
        length = os.fstat(descriptor).st_size
        if length == 0 or os.pread(descriptor, 1, length - 1) == b"\n":
            return
        torn = _since_last_newline(descriptor, length)
        notice = _line({"event": "torn_line", "torn_bytes": torn})
        self._finish_write(descriptor, b"\n" + notice)

    def _finish_write(self, descriptor: int, rest: bytes) -> None:
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    def _rotate(self) -> None:
        if self._fsync != "never":
            self.sync()
        with self._locked():
            descriptor = self._descriptor
            if descriptor is not None and not self._was_replaced(descriptor):
                # From the oldest on, so that a crash in between loses none.
                for number in range(self._keep - 1, 0, -1):
                    source = self._numbered(number - 1)
                    if source.exists():
                        source.replace(self._numbered(number))
                if self._keep == 1:
                    self._path.unlink()
            self._let_go()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._path.with_name(self._path.name + _LOCK_SUFFIX)
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def now() -> str:
    """The time as the log has it: UTC, ISO 8601, to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def read_log(path: Path) -> Iterator[dict[str, object]]:
    """The records of one file, oldest first; torn lines are left out."""
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _line(record: Mapping[str, object]) -> bytes:
    # ASCII: a lone surrogate or a line separator in an excerpt cannot break the file.
    return json.dumps({"time": now(), **record}, separators=(",", ":")).encode("ascii") + b"\n"


def _since_last_newline(descriptor: int, length: int) -> int:
    size = 4096
    torn = 0
    while torn < length:
        start = max(0, length - torn - size)
        chunk = os.pread(descriptor, length - torn - start, start)
        newline = chunk.rfind(b"\n")
        if newline >= 0:
            return torn + len(chunk) - newline - 1
        torn += len(chunk)
    return torn
