"""Runs stages one after the other and writes the result file after each, come what may."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptjet.benchmarks.environment import record_environment, without_paths
from gptjet.benchmarks.gpu_evidence.bars import judge_bars
from gptjet.benchmarks.gpu_evidence.stages import Record, Stage, summarize

PASSED, FAILED, UNAVAILABLE, TIMED_OUT = "passed", "failed", "unavailable", "timed out"
WITHHELD = "withheld"
_ERROR_TAIL = 1500


def run_stage(stage: Stage) -> Record:
    """Run one stage to its end or its timeout. Lines it printed until then are kept.

    The status is "unavailable" where the machine cannot run it (exit code 2), "failed" for any
    other failure, a crash of the process included.
    """
    started = time.monotonic()
    with subprocess.Popen(
        stage.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # its own process group: a compiler that it started is stopped with it
        start_new_session=True,
    ) as process:
        lines, errors = _Reader(process.stdout), _Reader(process.stderr)
        timed_out = False
        try:
            process.wait(timeout=stage.timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _stop_group(process)
    records = [record for line in lines.text().splitlines() if (record := _parse(line))]
    error = next((record for record in records if record["kind"] == "error"), None)
    if timed_out:
        status = TIMED_OUT
        detail = f"stopped after {stage.timeout_s:.0f} s"
    elif process.returncode == 0:
        status, detail = PASSED, ""
    else:
        is_unavailable = bool(error and error.get("unavailable"))
        status = UNAVAILABLE if is_unavailable else FAILED
        detail = error["message"] if error else f"exit code {process.returncode}"
        if not error:
            detail += f": {errors.text()[-_ERROR_TAIL:].strip()}"
    return {
        "name": stage.name,
        "status": status,
        "detail": without_paths(detail),
        "seconds": round(time.monotonic() - started, 2),
        "arguments": list(stage.command[1:]),
        "records": [record for record in records if record["kind"] != "error"],
    }


def run_all(
    stages: Sequence[Stage],
    result_file: Path,
    *,
    command: str,
    deadline_s: float | None = None,
    report: Callable[[str], None] = print,
) -> Record:
    """Run the stages in order, write `result_file` after each, and return what is in it.

    `deadline_s`: seconds for everything together; a stage gets at most what is left of it.
    """
    started = time.monotonic()
    result: Record = {
        "schema": 1,
        "kind": "gpu-evidence",
        "command": command,
        "environment": record_environment(),
        "stages": [],
        "summary": [],
        "bars": [],
    }
    for stage in stages:
        left = None if deadline_s is None else deadline_s - (time.monotonic() - started)
        unproven = _unproven(stage, result["stages"])
        if unproven:
            outcome = _not_run(stage, WITHHELD, f"not proven: {', '.join(unproven)}")
        elif left is not None and left < 1:
            detail = "not started: the time for all stages had passed"
            outcome = _not_run(stage, TIMED_OUT, detail)
        else:
            timeout_s = stage.timeout_s if left is None else min(stage.timeout_s, left)
            report(f"{stage.name}: running, at most {timeout_s:.0f} s")
            outcome = run_stage(replace(stage, timeout_s=timeout_s))
        result["stages"].append(outcome)
        records = [record for done in result["stages"] for record in done["records"]]
        result["summary"] = summarize(records)
        result["bars"] = judge_bars(records)
        _write(result_file, result)
        words = f"{stage.name}: {outcome['status']} in {outcome['seconds']} s"
        report(f"{words}: {outcome['detail']}" if outcome["detail"] else words)
    return result


def _unproven(stage: Stage, done: Sequence[Record]) -> list[str]:
    """The subjects that it needs and that no stage has proven, or that one has found wrong."""
    proofs: dict[str, bool] = {}
    for record in (record for outcome in done for record in outcome["records"]):
        if record["kind"] == "proof":
            subject = record["subject"]
            proofs[subject] = proofs.get(subject, True) and record["passed"] is True
    return [subject for subject in stage.needs if not proofs.get(subject, False)]


def _not_run(stage: Stage, status: str, detail: str) -> Record:
    return {
        "name": stage.name,
        "status": status,
        "detail": detail,
        "seconds": 0.0,
        "arguments": list(stage.command[1:]),
        "records": [],
    }


class _Reader:
    """Reads a pipe to its end in a thread, so that a full pipe never stops the stage."""

    def __init__(self, pipe: Any) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def text(self) -> str:
        """Everything read; waits for the end of the pipe, which the stopped process has closed."""
        self._thread.join(timeout=10)
        parts = []
        while not self._lines.empty():
            parts.append(self._lines.get())
        return "".join(parts)

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self._lines.put(line)


def _stop_group(process: subprocess.Popen[str]) -> None:
    """End whatever is left of the stage; its group is gone where it ended by itself."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _parse(line: str) -> Record | None:
    """A record, or None for a line that some library printed."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def _write(path: Path, result: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
