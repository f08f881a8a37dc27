"""Classifies a file: many rows in flight, one line of a journal each, in order, exactly once.

The journal (`out.csv.part`) is JSON lines: what is being made, then one line a finished row, in the
order of the input. Started again after whatever end, it cuts half a line off and goes on after the
last whole one. When all rows are there, the output is written beside its name and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.pipeline import (
    ROW_ERRORS,
    SERVER_ERRORS,
    classify_patiently,
    in_order,
    while_server_works,
)
from gptjet.service.apps.sentiment.result import SentimentResult, TextError
from gptjet.service.apps.sentiment.table import (
    Row,
    Table,
    TableFormat,
    TableWriter,
    format_of,
    read_table,
    spreadsheet_safe,
)

_JOURNAL_VERSION = 1
# What every journal begins with: the first key of its heading.
_JOURNAL_START = b'{"journal"'
_JOURNAL_SUFFIX = ".part"
_OWN_COLUMNS = ("label", "explanation", "uncertain_reason", "num_parts", "error")
_CLASH_PREFIX = "sentiment_"


class BatchError(Exception):
    """The run cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """What is to be made. A journal is only continued by a run with the same one.

    concurrency  rows in flight at the server
    excel_safe   cells that a spreadsheet would take for formulas get a ' before them
    """

    source: Path
    column: str
    out: Path
    seed: int = 0
    concurrency: int = 16
    excel_safe: bool = False
    overwrite: bool = False


@dataclass(slots=True)
class BatchSummary:
    """How many rows have which label, and which have an error (line, what)."""

    rows: int = 0
    resumed: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    errors: list[tuple[int, str]] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> None:
        """A line of the journal."""
        self.rows += 1
        if entry["error"] is not None:
            self.errors.append((entry["line"], entry["error"]))
        else:
            self.labels[entry["label"]] += 1


# Called with the number of rows that are done, at the start and after each.
OnProgress = Callable[[int], None]


async def classify_file(
    classifier: SentimentClassifier, spec: BatchSpec, on_progress: OnProgress = lambda _: None
) -> BatchSummary:
    """Make `spec.out`; go on where an earlier run with the same spec was cut off.

    Raises BatchError, TableError, OSError, and for what no row is to blame for ServerGoneError and
    GptjetError: the journal keeps what is done.
    """
    out_format = format_of(spec.out.name)
    with spec.source.open("rb") as file:
        table = read_table(file, spec.column, format_of(spec.source.name), str(spec.source))
        heading = await _heading(classifier, spec)
        with _Journal(spec.out, heading, overwrite=spec.overwrite) as journal:
            summary = BatchSummary()
            for entry in journal.entries():
                summary.add(entry)
            summary.resumed = summary.rows
            on_progress(summary.rows)
            for _ in range(summary.rows):
                next(table.rows)
            made = in_order(
                table.rows, lambda row: _entry(classifier, row, spec.seed), spec.concurrency
            )
            kept = while_server_works(
                made,
                lambda one: one.server_failed,
                lambda one: f"line {one.entry['line']}: {one.entry['error']}",
            )
            async with contextlib.aclosing(kept):
                async for one in kept:
                    journal.append(one.entry)
                    summary.add(one.entry)
                    on_progress(summary.rows)
            _write(spec, out_format, table, classifier, journal)
    return summary


def count_rows(source: Path, column: str) -> int:
    """How many rows a file has. Raises what `read_table` raises."""
    with source.open("rb") as file:
        return sum(1 for _ in read_table(file, column, format_of(source.name), str(source)).rows)


def journal_path(out: Path) -> Path:
    """Where the rows of an unfinished output are kept."""
    return out.with_name(out.name + _JOURNAL_SUFFIX)


def columns_of(classifier: SentimentClassifier, taken: tuple[str, ...]) -> dict[str, str]:
    """Our columns, and what they are called beside those that the input has."""
    own = ("label", *(f"p_{label.name}" for label in classifier.template.labels), *_OWN_COLUMNS[1:])
    prefix = ""
    while not {prefix + name for name in own}.isdisjoint(taken):
        prefix += _CLASH_PREFIX
    return {name: prefix + name for name in own}


def result_values(result: SentimentResult) -> dict[str, Any]:
    """The values of our columns for a result."""
    return {
        "label": result.label,
        **{f"p_{name}": round(p, 6) for name, p in result.probabilities.items()},
        "explanation": result.explanation,
        "uncertain_reason": result.uncertain_reason,
        "num_parts": result.num_parts,
        "error": None,
    }


async def _heading(classifier: SentimentClassifier, spec: BatchSpec) -> dict[str, Any]:
    """What a run must share with an earlier one to go on with its rows."""
    template = json.dumps(asdict(classifier.template), sort_keys=True, default=str)
    with spec.source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model = await classifier.model()
    return {
        "journal": _JOURNAL_VERSION,
        "input": digest,
        "column": spec.column,
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "explain": classifier.options.explain,
        "seed": spec.seed,
        "model": model.name,
        # Another number type or backend rounds otherwise: one file is made by one of them.
        "dtype": model.dtype,
        "backend": model.backend,
    }


@dataclass(frozen=True, slots=True)
class _Made:
    """The journal's line for a row; whether the server failed at it, None if it was not asked."""

    entry: dict[str, Any]
    server_failed: bool | None


async def _entry(classifier: SentimentClassifier, row: Row, seed: int) -> _Made:
    values: dict[str, Any] = {"label": None, "error": row.error}
    server_failed: bool | None = None
    if row.error is None:
        try:
            values = result_values(await classify_patiently(classifier, row.text, seed=seed))
            server_failed = False
        except ROW_ERRORS as error:
            values["error"] = str(error)
            if not isinstance(error, TextError):
                server_failed = isinstance(error, SERVER_ERRORS)
    return _Made({"line": row.line, "row": row.values, **values}, server_failed)


class _Journal:
    """The append-only file of finished rows; locked while it is open."""

    def __init__(self, out: Path, heading: dict[str, Any], *, overwrite: bool) -> None:
        self.path = journal_path(out)
        self._out = out
        self._heading = heading
        self._overwrite = overwrite
        self._file: BinaryIO | None = None

    def __enter__(self) -> _Journal:
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        if is_new and self._out.exists() and not self._overwrite:
            raise BatchError(f"{self._out} exists already; --overwrite replaces it")
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._check_is_ours()
            self._repair()
            if self._file.tell() == 0:
                self.append(self._heading)
            else:
                self._check_heading()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def append(self, entry: dict[str, Any]) -> None:
        """One line, written to the system at once: a killed process loses none."""
        assert self._file is not None
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()

    def entries(self) -> Iterator[dict[str, Any]]:
        """The finished rows, in order."""
        with self.path.open("rb") as file:
            next(file)
            for line in file:
                yield json.loads(line)

    def remove(self) -> None:
        """The output is there."""
        self.path.unlink()

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BatchError(f"another process is writing {self.path}") from None

    def _check_is_ours(self) -> None:
        """Somebody's download may have the same name: only a journal is ever cut.

        Half a heading is what a run leaves that was killed as it began.
        """
        assert self._file is not None
        self._file.seek(0)
        start = self._file.read(len(_JOURNAL_START))
        is_ours = _JOURNAL_START.startswith(start)
        if is_ours and len(start) == len(_JOURNAL_START):
            line = start + self._file.readline()
            if line.endswith(b"\n"):
                try:
                    json.loads(line)
                except ValueError:
                    is_ours = False
        if not is_ours:
            raise BatchError(
                f"{self.path} is no journal of a classified file; "
                f"move it away, or give another --out"
            )

    def _repair(self) -> None:
        """Cut off what is not a whole line of JSON: the end of a write that was cut short."""
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                json.loads(line)
            except ValueError:
                break
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(whole)

    def _check_heading(self) -> None:
        with self.path.open("rb") as file:
            found = json.loads(next(file))
        changed = [key for key, value in self._heading.items() if found.get(key) != value]
        if changed:
            raise BatchError(
                f"{self.path} was begun with another {' and '.join(changed)}; "
                f"delete it to begin anew, or give another --out"
            )


def _write(
    spec: BatchSpec,
    out_format: TableFormat,
    table: Table,
    classifier: SentimentClassifier,
    journal: _Journal,
) -> None:
    """The output from the journal: written beside its name, then renamed."""
    # Later objects of JSON lines may have keys that the first has not.
    keys = (key for entry in journal.entries() for key in entry["row"])
    columns = tuple(dict.fromkeys((*table.columns, *keys)))
    names = columns_of(classifier, columns)
    # Of this name whoever writes: the journal's lock lets in one, and what a kill left is replaced.
    unfinished = spec.out.with_name(f"{spec.out.name}.tmp")
    try:
        # A JSON line may escape what is no character; it becomes a question mark.
        with unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = TableWriter(
                file, out_format, [*columns, *names.values()], excel_safe=spec.excel_safe
            )
            for entry in journal.entries():
                own = {names[key]: entry.get(key) for key in names if key in entry}
                explanation = own.get(names["explanation"])
                if out_format is not TableFormat.JSONL and explanation:
                    # A model's words, which nobody has looked at.
                    own[names["explanation"]] = spreadsheet_safe(explanation)
                if own[names["error"]] is not None:
                    own[names["error"]] = f"line {entry['line']}: {own[names['error']]}"
                writer.write(entry["row"] | own)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(spec.out)
    finally:
        unfinished.unlink(missing_ok=True)
    journal.remove()
