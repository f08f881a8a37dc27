"""Result files: what a kill leaves, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjet.benchmarks.results import ResultsError, ResultsWriter, read_records


def write(path: Path, *kinds: str) -> None:
    with ResultsWriter(path) as writer:
        for kind in kinds:
            writer.append(kind, {"value": 1.5})


def test_records_are_appended_and_read_back_with_their_schema(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.jsonl"
    write(path, "one")
    write(path, "two", "three")
    assert [r["kind"] for r in read_records(path)] == ["one", "two", "three"]
    assert {r["schema"] for r in read_records(path)} == {1}


@pytest.mark.parametrize("torn", [b'{"schema":1,"ki', b'{"schema":1,"kind":"whole"}', b"\xff"])
def test_a_torn_last_line_is_skipped_and_then_removed(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "results.jsonl"
    write(path, "one")
    path.write_bytes(path.read_bytes() + torn)
    assert [r["kind"] for r in read_records(path)] == ["one"]
    write(path, "two")
    assert [r["kind"] for r in read_records(path)] == ["one", "two"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"schema"' + b"x" * 200_000)
    write(path, "one")
    assert [r["kind"] for r in read_records(path)] == ["one"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    write(path, "one", "two", "three")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ResultsError, match="line 2 is not JSON"):
        list(read_records(path))


def test_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"schema":99,"kind":"sample"}\n')
    with pytest.raises(ResultsError, match="schema 99"):
        list(read_records(path))


def test_two_writers_cannot_share_a_file_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    script = (
        "import sys, time; from pathlib import Path; from gptjet.benchmarks.results import *\n"
        "writer = ResultsWriter(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(ResultsError, match="another process"):
            ResultsWriter(path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    write(path, "after")


def test_not_a_number_is_refused_before_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer, pytest.raises(ValueError, match="not JSON compliant"):
        writer.append("sample", {"value": float("nan")})
    assert path.read_bytes() == b""


def test_a_file_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ResultsError, match=r"file/a\.jsonl cannot be written: "):
        ResultsWriter(tmp_path / "file" / "a.jsonl")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ResultsWriter(tmp_path / "a.jsonl") as writer:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(ResultsError, match=r"a\.jsonl: a record cannot be written: No space"):
            writer.append("sample", {"run": 1})
