"""The review queue: what flag rules found, for a person to approve or reject. SQLite, WAL.

One item is one rule and one text that it found, known by its digest: a text that is found again is
counted, not queued again. A decision has its reviewer, its time and a note; every decision ever
made is kept in `decisions`, also one that was changed later.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptjet.service.governance.audit import now

Status = Literal["pending", "approved", "rejected"]
STATUSES: tuple[Status, ...] = ("pending", "approved", "rejected")

# How long a writer waits for another one (the command line beside the server).
_BUSY_S = 5.0
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE items (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    rule TEXT NOT NULL,
    digest TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'approved', 'rejected')),
    first_seen TEXT NOT NULL,
    last_seen TEXT NOT NULL,
    seen INTEGER NOT NULL DEFAULT 1,
    request_id TEXT NOT NULL,
    method TEXT NOT NULL,
    direction TEXT NOT NULL,
    field TEXT NOT NULL,
    span_start INTEGER NOT NULL,
    span_end INTEGER NOT NULL,
    excerpt TEXT,
    UNIQUE (rule, digest)
) STRICT;
CREATE INDEX items_by_status ON items (status, id);
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    item_id INTEGER NOT NULL REFERENCES items (id),
    status TEXT NOT NULL CHECK (status IN ('approved', 'rejected')),
    reviewer TEXT NOT NULL,
    decided_at TEXT NOT NULL,
    note TEXT NOT NULL DEFAULT ''
) STRICT;
"""
_COLUMNS = (
    "id, rule, digest, status, first_seen, last_seen, seen, request_id, method, direction, field, "
    "span_start, span_end, excerpt"
)


class ReviewError(Exception):
    """The queue cannot be used, or has no such item; one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flagged:
    """A finding to be queued. `excerpt` is None unless texts may be kept."""

    rule: str
    digest: str
    request_id: str
    method: str
    direction: str
    field: str
    start: int
    end: int
    excerpt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a reviewer decided."""

    status: Status
    reviewer: str
    decided_at: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewItem:
    """One item of the queue; request_id, field and span are those of the first time."""

    id: int
    rule: str
    digest: str
    status: Status
    first_seen: str
    last_seen: str
    seen: int
    request_id: str
    method: str
    direction: str
    field: str
    start: int
    end: int
    excerpt: str | None
    decisions: tuple[Decision, ...] = ()


class ReviewQueue:
    """A queue in a file, made where there is none unless `must_exist`; for one thread.

    Methods raise ReviewError.
    """

    def __init__(self, path: Path, *, must_exist: bool = False) -> None:
        self._path = path
        if must_exist and not path.is_file():
            raise ReviewError(f"{path}: there is no review queue")
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            with self._errors():
                self._set_up()
        except ReviewError:
            self._database.close()
            raise

    def add(self, flagged: Iterable[Flagged]) -> None:
        """Queue findings; one that is there already is counted."""
        time = now()
        rows = [
            (
                *(f.rule, f.digest, time, time, f.request_id, f.method),
                *(f.direction, f.field, f.start, f.end, f.excerpt),
            )
            for f in flagged
        ]
        with self._transaction():
            self._database.executemany(
                "INSERT INTO items (rule, digest, first_seen, last_seen, request_id, method,"
                " direction, field, span_start, span_end, excerpt)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (rule, digest) DO UPDATE SET seen = seen + 1,"
                " last_seen = excluded.last_seen",
                rows,
            )

    def items(self, status: Status | None = None, limit: int = 100) -> list[ReviewItem]:
        """The oldest items with that status, without their decisions."""
        where, values = ("WHERE status = ?", (status,)) if status else ("", ())
        with self._errors():
            rows = self._database.execute(
                f"SELECT {_COLUMNS} FROM items {where} ORDER BY id LIMIT ?", (*values, limit)
            ).fetchall()
        return [_item(row) for row in rows]

    def item(self, item_id: int) -> ReviewItem:
        """One item with all its decisions, oldest first."""
        with self._errors():
            row = self._database.execute(
                f"SELECT {_COLUMNS} FROM items WHERE id = ?", (item_id,)
            ).fetchone()
            decisions = self._database.execute(
                "SELECT status, reviewer, decided_at, note FROM decisions WHERE item_id = ?"
                " ORDER BY id",
                (item_id,),
            ).fetchall()
        if row is None:
            raise ReviewError(f"{self._path}: there is no item {item_id}")
        return _item(
            row,
            tuple(
                Decision(status=status, reviewer=reviewer, decided_at=decided_at, note=note)
                for status, reviewer, decided_at, note in decisions
            ),
        )

    def decide(self, item_id: int, status: Status, reviewer: str, note: str = "") -> ReviewItem:
        """Record a decision; a later one holds over an earlier one."""
        if status == "pending":
            raise ValueError("a decision is approved or rejected")
        if not reviewer.strip():
            raise ReviewError("a decision needs the name of its reviewer")
        with self._transaction():
            changed = self._database.execute(
                "UPDATE items SET status = ? WHERE id = ?", (status, item_id)
            ).rowcount
            if changed:
                self._database.execute(
                    "INSERT INTO decisions (item_id, status, reviewer, decided_at, note)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (item_id, status, reviewer, now(), note),
                )
        return self.item(item_id)

    def rejected(self) -> frozenset[tuple[str, str]]:
        """(rule, digest) of every rejected item."""
        with self._errors():
            return frozenset(
                self._database.execute(
                    "SELECT rule, digest FROM items WHERE status = 'rejected'"
                ).fetchall()
            )

    def num_pending(self) -> int:
        """Items that nobody has decided on."""
        with self._errors():
            row = self._database.execute("SELECT count(*) FROM items WHERE status = 'pending'")
            return int(row.fetchone()[0])

    def data_version(self) -> int:
        """A number that changes when another process has written."""
        with self._errors():
            return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Close the file; safe to call again."""
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def _set_up(self) -> None:
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            self._database.execute("PRAGMA journal_mode = WAL")
            self._path.chmod(0o600)
            with self._transaction():
                # Another process may have been first.
                if self._database.execute("PRAGMA user_version").fetchone()[0] == 0:
                    for statement in _SCHEMA.split(";\n"):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif version != _SCHEMA_VERSION:
            raise ReviewError(f"{self._path}: a review queue of version {version}, not 1")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("PRAGMA foreign_keys = ON")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            try:
                self._database.execute("COMMIT")
            except sqlite3.Error:
                # Else the next transaction would find this one open.
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ReviewError(f"{self._path}: {error}") from error


def _item(row: Sequence[object], decisions: tuple[Decision, ...] = ()) -> ReviewItem:
    names = [name.strip() for name in _COLUMNS.split(",")]
    values = dict(zip(names, row, strict=True))
    values["start"], values["end"] = values.pop("span_start"), values.pop("span_end")
    return ReviewItem(**values, decisions=decisions)  # type: ignore[arg-type]
