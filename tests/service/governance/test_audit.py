"""The audit log loses no line, whatever the disk and the process do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptjet.service.governance.audit import AuditLog, Fsync, read_log


def open_log(
    path: Path, *, max_bytes: int = 10**6, keep: int = 3, fsync: Fsync = "never"
) -> AuditLog:
    return AuditLog(path, max_bytes=max_bytes, keep=keep, fsync=fsync)


def numbers(*paths: Path) -> list[object]:
    return [record["n"] for path in paths for record in read_log(path) if "n" in record]


def test_lines_are_json_with_a_time_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    log = open_log(path)
    log.append([{"n": 1, "text": 'é\n\u2028"\ud800'}])
    log.append([{"n": 2}])
    log.close()
    first, second = path.read_text(encoding="ascii").splitlines()
    assert json.loads(first)["text"] == 'é\n\u2028"\ud800'
    assert json.loads(second)["time"].endswith("Z")
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("torn", ['{"n": 9', "x" * 10_000])
def test_a_torn_last_line_is_ended_and_said_and_nothing_is_removed(
    tmp_path: Path, torn: str
) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"n": 1}\n' + torn)
    log = open_log(path)
    log.append([{"n": 2}])
    log.close()
    assert path.read_text().startswith('{"n": 1}\n' + torn + "\n")
    one, notice, two = read_log(path)
    assert (one["n"], two["n"]) == (1, 2)
    assert (notice["event"], notice["torn_bytes"]) == ("torn_line", len(torn))


def test_rotation_keeps_the_newest_files_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = open_log(path, max_bytes=400, keep=3)
    for number in range(40):
        log.append([{"n": number, "pad": "x" * 20}])
    log.close()
    files = [path.with_name(f"audit.jsonl.{n}") for n in (2, 1)]
    kept = numbers(*files, path)
    assert kept == list(range(40 - len(kept), 40))
    assert len(kept) >= 8
    assert all(file.stat().st_size <= 400 for file in (*files, path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("audit.jsonl", "audit.jsonl.1", "audit.jsonl.2", "audit.jsonl.lock")
    ]


def test_a_record_larger_than_a_file_is_written_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = open_log(path, max_bytes=50, keep=1)
    for number in range(3):
        log.append([{"n": number, "pad": "x" * 100}])
    log.close()
    assert numbers(path) == [2]


def test_a_file_rotated_by_another_process_is_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = open_log(path)
    log.append([{"n": 1}])
    path.rename(path.with_name("audit.jsonl.1"))
    log.append([{"n": 2}])
    log.close()
    assert numbers(path) == [2]
    assert numbers(path.with_name("audit.jsonl.1")) == [1]


def test_two_writers_that_rotate_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [open_log(path, max_bytes=500, keep=1000) for _ in range(2)]
    for number in range(100):
        logs[number % 2].append([{"n": number}])
    for log in logs:
        log.close()
    files = [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    assert sorted(numbers(*files)) == list(range(100))


def test_a_full_disk_raises_and_the_next_line_is_whole(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: a write stops in the middle of a line, then fails."""
    path = tmp_path / "audit.jsonl"
    program = f"""
import resource, signal, pathlib
from gptjet.service.governance.audit import AuditLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(pathlib.Path({str(path)!r}), max_bytes=10**6, keep=2, fsync="always")
log.append([{{"n": 1}}])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
size = pathlib.Path({str(path)!r}).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
for number in (2, 3):
    try:
        log.append([{{"n": number}}])
    except OSError as error:
        print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.append([{{"n": 4}}])
log.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["refused", "27", "refused", "27"]
    assert numbers(path) == [1, 4]
    assert [r["torn_bytes"] for r in read_log(path) if r.get("event") == "torn_line"] == [5]


def test_a_killed_writer_leaves_every_line_it_was_told_is_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    program = f"""
import pathlib, sys
from gptjet.service.governance.audit import AuditLog
log = AuditLog(pathlib.Path({str(path)!r}), max_bytes=3000, keep=10**4, fsync="never")
for number in range(10**9):
    log.append([{{"n": number}}])
    print(number, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(200)][-1]
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.stdout.close()
    process.wait()
    told = int(rest[-2]) if len(rest) > 1 else told
    log = open_log(path)
    log.append([{"end": 1}])
    log.close()
    files = [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    written = sorted(n for n in numbers(*files) if isinstance(n, int))
    assert written == list(range(len(written)))
    assert written[-1] >= told


def test_a_folder_that_cannot_be_written_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_log(tmp_path / "file" / "audit.jsonl").append([{"n": 1}])


@pytest.mark.parametrize(("fsync", "at_once"), [("always", 2), ("second", 0), ("never", 0)])
def test_fsync_is_as_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: Fsync, at_once: int
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = open_log(tmp_path / "audit.jsonl", fsync=fsync)
    log.append([{"n": 1}])
    log.append([{"n": 2}])
    assert len(synced) == at_once
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    log.sync(if_due=True)
    log.sync(if_due=True)
    assert len(synced) == at_once + (fsync == "second")
    log.close()
