"""Result files: append-only JSON lines that survive a kill at any moment.

One record is one line and one write, on disk before the next run starts. A line that a kill tore is
the last one: reading skips it, the next writer removes it. A lock keeps two writers apart; it falls
with its process, so a killed sweep leaves none behind.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCHEMA_VERSION = 1


class ResultsError(Exception):
    """A result file cannot be used; the message is one line for a person."""


class ResultsWriter:
    """Appends records to a file, made if it is missing. Use it as a context manager.

    Raises ResultsError where another process is writing to it, and where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ResultsError(f"{path} cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise ResultsError(f"{path} is being written by another process") from None
        self._remove_torn_line()

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Write one record and have it on disk. `kind` says what it is; NaN is refused."""
        record = {"schema": SCHEMA_VERSION, "kind": kind, **fields}
        line = json.dumps(record, separators=(",", ":"), allow_nan=False, ensure_ascii=False) + "\n"
        remaining = line.encode()
        try:
            while remaining:
                remaining = remaining[os.write(self._descriptor, remaining) :]
            os.fsync(self._descriptor)
        except OSError as error:
            raise ResultsError(
                f"{self.path}: a record cannot be written: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        """Give the lock back."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _remove_torn_line(self) -> None:
        """Cut what follows the last line end: half a record, of a run that will be made again."""
        size = os.fstat(self._descriptor).st_size
        end, block = size, 65536
        while end > 0:
            start = max(0, end - block)
            tail = os.pread(self._descriptor, end - start, start)
            newline = tail.rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._descriptor, end)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every record in order. A torn last line is skipped.

    Raises ResultsError, naming the line, for one that is broken in the middle and for a schema that
    this version does not know.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    lines = data.split(b"\n")
    # After the last line end comes nothing, or a line that was torn.
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResultsError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or "kind" not in record:
            raise ResultsError(f"{path}: line {number} is not a result record")
        if record.get("schema") != SCHEMA_VERSION:
            raise ResultsError(
                f"{path}: line {number} has schema {record.get('schema')}, "
                f"this version reads {SCHEMA_VERSION}"
            )
        yield record
