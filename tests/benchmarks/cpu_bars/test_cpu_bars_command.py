"""`python -m gptjet.benchmarks.cpu_bars`: real processes on a small model, resuming, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from gptjet.benchmarks.cpu_bars import __main__ as command
from gptjet.benchmarks.cpu_bars.build import fingerprint
from gptjet.benchmarks.cpu_bars.busy import busy_cores, usable_cores
from gptjet.benchmarks.results import read_records

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets the number of threads for all processes; that is taken back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(command, "measure_in_subprocess", lambda device: {"read_gb_s": 20.0})


def test_a_quick_look_with_real_processes_records_rounds_and_who_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peers are not set up under this root; ours run on the embedded checkpoint."""
    only_ours = [
        race for race in command.make_races(["S"], "huggingface", quick=True) if race.name == "fp32"
    ]
    monkeypatch.setattr(command, "make_races", lambda *_, **__: only_ours)
    monkeypatch.setattr(
        "gptjet.benchmarks.cpu_bars.design.Race.runs_cell",
        lambda race, entry, cell: cell.kind == "decode" and "compiled" not in entry.contestant,
    )
    out, markdown = tmp_path / "bars.jsonl", tmp_path / "bars.md"
    arguments = ["--only", "S", "--quick", "--backend", "huggingface", "--threads", "1"]
    arguments += ["--root", str(tmp_path / "root"), "--out", str(out)]
    assert command.main([*arguments, "--markdown", str(markdown)]) == command.FAILURE
    records = list(read_records(out))
    assert records[0]["kind"] == "bars_session"
    assert records[0]["environment"]["packages"]
    rounds = [record for record in records if record["kind"] == "bars_round"]
    assert [record["round"] for record in rounds] == [0, 1]
    for record in rounds:
        engine, server = (record["figures"][f"{n}:huggingface/fp32"] for n in ("engine", "gptjet"))
        assert engine["tokens"] == server["tokens"]
        assert min(engine["peak_memory_bytes"], server["peak_memory_bytes"]) > 50 * 2**20
    absent = {record["entry"] for record in records if record["kind"] == "bars_absent"}
    assert "ctranslate2/fp32" in absent
    assert "ctranslate2 is not set up" in markdown.read_text()
    versions = f"torch {records[0]['environment']['packages']['torch']}, transformers"
    assert f"cores, 1 threads: {versions}" in markdown.read_text()
    assert "engine:huggingface/fp32" in capsys.readouterr().out

    before = out.read_bytes()
    assert command.main([*arguments, "--report"]) == command.FAILURE
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "before"), [("threads", 9), ("build", "0" * 16), ("backend", "mock")]
)
def test_rounds_of_another_build_or_number_of_threads_are_not_added_to(
    field: str,
    before: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "make_races", lambda *_, **__: [])
    arguments = ["--threads", "1", "--out", str(tmp_path / "bars.jsonl")]
    assert command.main(arguments) == command.OK
    assert command.main(arguments) == command.OK  # the same again
    session, _ = read_records(tmp_path / "bars.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**session, field: before}) + "\n")
    size = other.stat().st_size
    arguments[-1] = str(other)
    assert command.main(arguments) == command.USAGE
    assert f"rounds were made with {field} {before}" in capsys.readouterr().err
    assert other.stat().st_size == size
    assert command.main([*arguments, "--report"]) == command.OK
    assert command.main([*arguments, "--mixed"]) == command.OK
    assert ("Rounds of 2 builds" in capsys.readouterr().out) == (field == "build")


def test_a_build_is_told_by_the_sources_of_kernels_and_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    room = tmp_path / "a_room"
    room.mkdir()
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("kernel.c", ""), ("notes.md", "")):
        (room / name).write_text(text)
        seen.add(fingerprint(["a_room"]))
    assert len(seen) == 3
    assert fingerprint() == fingerprint() != fingerprint(["a_room"])


def test_a_report_of_a_file_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--out", str(tmp_path / "no.jsonl"), "--report"]) == command.USAGE
    assert "no.jsonl: no such file" in capsys.readouterr().err


def test_an_interrupt_says_that_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "checkpoint_folder", interrupted)
    assert command.main(["--out", str(tmp_path / "bars.jsonl")]) == command.INTERRUPTED
    assert "the same command goes on" in capsys.readouterr().err


def test_the_page_in_the_repository_is_what_the_command_writes(tmp_path: Path) -> None:
    """From the newest file of the results; their names begin with the date."""
    newest = max((ROOT / "benchmarks" / "results").glob("*-cpu-bars*.jsonl"))
    page = tmp_path / "page.md"
    command.main(["--out", str(newest), "--report", "--markdown", str(page)])
    assert page.read_text() == (ROOT / "docs" / "cpu-bars.md").read_text()


def test_every_core_has_a_busy_process_and_none_is_left_behind() -> None:
    with busy_cores() as pids:
        assert len(pids) == len(usable_cores())
        for pid, core in zip(pids, usable_cores(), strict=True):
            assert os.sched_getaffinity(pid) == {core}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            pytest.fail(f"process {pid} still runs")
