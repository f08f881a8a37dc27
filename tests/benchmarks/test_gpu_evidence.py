"""The evidence command: isolated stages, an honest result file, and the whole of it on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.gpu_evidence import __main__ as command
from gptjet.benchmarks.gpu_evidence.runner import run_all, run_stage
from gptjet.benchmarks.gpu_evidence.stages import Stage, as_table, plan_stages, summarize

ROOT = Path(__file__).resolve().parents[2]
CELL = {
    "kind": "cell",
    "input_tokens": 50,
    "output_tokens": 2,
    "ttft_ms": [30.0, 10.0, 20.0],
    "itl_ms": [[1.0], [2.0], [9.0]],
    "tokens_per_s": [100.0, 300.0, 200.0],
}


def stage(code: str, *, name: str = "stage", timeout_s: float = 30.0) -> Stage:
    return Stage(name, (sys.executable, "-c", code), timeout_s)


def test_finished_stage_keeps_its_records_and_ignores_what_libraries_print() -> None:
    outcome = run_stage(stage("print('loading...'); print('{\"kind\": \"model\"}'); print('[1]')"))
    assert outcome["status"] == "passed"
    assert outcome["records"] == [{"kind": "model"}]


def test_crash_is_a_failure_with_the_end_of_its_errors_and_no_paths() -> None:
    outcome = run_stage(
        stage(
            "print('{\"kind\": \"model\"}', flush=True); raise OSError('/home/someone/x/y.so gone')"
        )
    )
    assert outcome["status"] == "failed"
    assert "y.so gone" in outcome["detail"]
    assert "/home/someone" not in outcome["detail"]
    assert outcome["records"] == [{"kind": "model"}]


def test_process_killed_by_a_signal_is_a_failure() -> None:
    outcome = run_stage(stage("import os; os.abort()"))
    assert (outcome["status"], outcome["detail"][:13]) == ("failed", "exit code -6:")


def test_machine_that_cannot_run_a_stage_is_unavailable_not_failed() -> None:
    error = json.dumps({"kind": "error", "message": "no GPU", "unavailable": True})
    outcome = run_stage(stage(f"import sys; print({error!r}); sys.exit(2)"))
    assert (outcome["status"], outcome["detail"]) == ("unavailable", "no GPU")
    assert outcome["records"] == []


def test_hanging_stage_is_stopped_with_its_children_and_keeps_what_it_said(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = (
        f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(.05)"
    )
    code = (
        "import subprocess, sys, time\n"
        'print(\'{"kind": "model"}\', flush=True)\n'
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)\n"
    )
    outcome = run_stage(stage(code, timeout_s=3.0))
    assert outcome["status"] == "timed out"
    assert outcome["records"] == [{"kind": "model"}]
    time.sleep(0.3)
    alive.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not alive.exists()


def test_failed_stage_does_not_stop_the_next_and_the_file_is_written_after_each(
    tmp_path: Path,
) -> None:
    file = tmp_path / "deep" / "result.json"
    seen: list[int] = []

    def report(line: str) -> None:
        if ": running" in line and file.exists():
            seen.append(len(json.loads(file.read_text())["stages"]))

    cell = json.dumps({**CELL, "backend": "huggingface"})
    stages = [stage("1 / 0", name="a"), stage(f"print({cell!r})", name="b"), stage("", name="c")]
    result = run_all(stages, file, command="test", report=report)
    assert [done["status"] for done in result["stages"]] == ["failed", "passed", "passed"]
    assert seen == [1, 2]
    assert json.loads(file.read_text()) == result
    assert result["environment"]["packages"]["torch"]
    assert result["summary"][0]["huggingface_tokens_per_s"] == 200.0


def test_stages_after_the_deadline_are_recorded_as_not_started(tmp_path: Path) -> None:
    stages = [stage("import time; time.sleep(30)", name="a"), stage("", name="b")]
    result = run_all(
        stages, tmp_path / "r.json", command="", deadline_s=1.5, report=lambda line: None
    )
    assert [done["status"] for done in result["stages"]] == ["timed out", "timed out"]
    assert result["stages"][1]["detail"].startswith("not started")


def test_summary_has_medians_and_the_speed_up_only_where_both_backends_have_times() -> None:
    rows = summarize(
        [
            {**CELL, "backend": "huggingface"},
            {**CELL, "backend": "deepspeed", "tokens_per_s": [500.0, 400.0, 300.0]},
            {**CELL, "backend": "huggingface", "input_tokens": 7},
            {"kind": "parity"},
        ]
    )
    assert rows[0] == {
        "input_tokens": 7,
        "output_tokens": 2,
        "huggingface_ttft_ms": 20.0,
        "huggingface_itl_ms": 2.0,
        "huggingface_tokens_per_s": 200.0,
    }
    assert rows[1]["speed_up"] == 2.0
    lines = as_table(rows).splitlines()
    assert lines[1].split()[-1] == "-"
    assert lines[2].split()[-1] == "2.0"


def test_parity_comes_first_then_what_the_bars_ask_for_then_what_explains_it() -> None:
    stages = plan_stages(device="cuda", tiny=False, repeats=3, timeout_s=600.0, cores=16)
    assert [s.name for s in stages] == [
        "kernel-parity",
        "fused-parity-float16",
        "fused-parity-int8",
        "fused-parity-int4",
        "kernel-speed",
        "fused-latency-float16",
        "fused-latency-int8",
        "fused-latency-int4",
        "serving",
        "huggingface-latency",
        "deepspeed-latency",
        "huggingface-static-latency",
        "profile",
    ]
    by_name = {s.name: s for s in stages}
    for name in ("huggingface-latency", "deepspeed-latency", "huggingface-static-latency"):
        cells = by_name[name].command[by_name[name].command.index("--cells") + 1]
        assert cells.startswith("50:50,50:200,1000:50,1000:200")
    assert "1,2,4,8,16,32" in by_name["fused-latency-int4"].command
    assert {"512:128", "32"} < set(by_name["serving"].command)
    jobs = by_name["kernel-parity"].command.index("--jobs") + 1
    assert by_name["kernel-parity"].command[jobs] == "8"
    assert all("gpt-j-6b" in s.command for s in stages)
    assert sum(s.timeout_s for s in stages[:5]) <= 570  # all parity, and the bandwidth, at worst


def test_interpreted_kernels_have_the_time_that_a_busy_machine_takes() -> None:
    stages = plan_stages(device="cpu", tiny=True, repeats=1, timeout_s=300.0)
    assert {s.timeout_s for s in stages} == {300.0}


def test_whatever_is_timed_of_the_kernels_needs_their_parity_and_the_models() -> None:
    for planned in plan_stages(device="cuda", tiny=False, repeats=3, timeout_s=60.0):
        assert planned.timeout_s <= 60.0
        timed = [kind for kind in ("float16", "int8", "int4") if f"latency-{kind}" in planned.name]
        if planned.name in ("serving", "profile"):
            timed = ["float16"]
        expected = tuple(f"{part}/{kind}" for kind in timed for part in ("kernels", "model"))
        assert set(planned.needs) == {*expected, *(("kernels/shared",) if timed else ())}


def proof(subject: str, *, passed: bool) -> str:
    record = json.dumps({"kind": "proof", "subject": subject, "passed": passed, "cases": 1})
    return f"print({record!r})"


@pytest.mark.parametrize(
    ("before", "status"),
    [
        ([], "withheld"),
        ([proof("model/int8", passed=False)], "withheld"),
        ([proof("model/int8", passed=True), proof("model/int8", passed=False)], "withheld"),
        ([proof("model/int4", passed=True)], "withheld"),
        ([proof("model/int8", passed=True)], "passed"),
    ],
)
def test_times_are_withheld_until_their_subject_is_proven(
    before: list[str], status: str, tmp_path: Path
) -> None:
    timed = Stage("timed", (sys.executable, "-c", 'print(\'{"kind": "x"}\')'), 30, ("model/int8",))
    stages = [stage(code, name=str(number)) for number, code in enumerate(before)]
    result = run_all([*stages, timed], tmp_path / "r.json", command="", report=lambda line: None)
    last = result["stages"][-1]
    assert last["status"] == status
    assert last["records"] == ([{"kind": "x"}] if status == "passed" else [])
    if status == "withheld":
        assert last["detail"] == "not proven: model/int8"


def test_result_file_goes_where_the_device_machine_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", "/somewhere")
    assert command.default_result_file() == Path("/somewhere/gpu-evidence.json")
    monkeypatch.delenv("OUT")
    assert command.default_result_file().parent == Path("benchmarks/results")


@pytest.mark.timeout(1800)
def test_whole_command_on_a_cpu_runs_every_stage_and_judges_nothing(
    tmp_path: Path, quick_interpreter_folder: Path
) -> None:
    """From a bare checkout, as on the device machine: no installed package, no `make`."""
    environment = os.environ | {"PYTHONPATH": str(quick_interpreter_folder)}
    result = subprocess.run(
        [
            sys.executable,
            "benchmarks/gpu_evidence/bootstrap.py",
            *("--folder", str(tmp_path / "bare")),
            *("--device", "cpu", "--tiny", "--repeats", "2", "--out", str(tmp_path / "r.json")),
        ],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert result.returncode == 1, result.stderr  # DeepSpeed cannot be had here
    written = json.loads((tmp_path / "r.json").read_text())
    statuses = {s["name"]: (s["status"], s["detail"]) for s in written["stages"]}
    assert statuses.pop("deepspeed-latency")[0] == "unavailable"
    assert set(statuses.values()) == {("passed", "")}, statuses
    records = {s["name"]: s["records"] for s in written["stages"]}
    _check_huggingface(records["huggingface-latency"])
    proofs = [
        r["subject"] for r in [r for s in records.values() for r in s] if r["kind"] == "proof"
    ]
    assert sorted(proofs) == sorted(
        [f"{part}/{kind}" for part in ("kernels", "model") for kind in ("float16", "int8", "int4")]
        + ["kernels/shared"]
    )
    paths = [(r["path"], r["streams"]) for r in records["serving"] if r["kind"] == "serving"]
    assert sorted(set(paths)) == [("engine", 1), ("engine", 2), ("grpc", 1), ("grpc", 2)]
    assert {r["kind"] for r in records["profile"]} == {"model", "profile", "profile_step"}
    # Interpreted kernels have times, and no goal is judged by them.
    assert {bar["verdict"] for bar in written["bars"]} == {"not measured"}
    assert "HF tok/s" in result.stdout
    assert "one decode step" in result.stdout


def _check_huggingface(records: list[dict[str, Any]]) -> None:
    model, *cells, memory = records
    assert (model["kind"], model["geometry"], model["dtype"]) == ("model", "tiny", "float32")
    assert memory["kind"] == "memory"
    assert [(c["input_tokens"], c["output_tokens"]) for c in cells] == [(5, 4), (20, 8)]
    for cell in cells:
        assert len(cell["ttft_ms"]) == len(cell["itl_ms"]) == len(cell["tokens_per_s"]) == 2
        assert len(cell["itl_ms"][0]) == cell["output_tokens"] - 1
        total_ms = cell["ttft_ms"][0] + sum(cell["itl_ms"][0])
        assert cell["tokens_per_s"][0] == pytest.approx(
            1000 * cell["output_tokens"] / total_ms, rel=1e-3
        )
