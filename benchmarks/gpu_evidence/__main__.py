"""`python -m gptjet.benchmarks.gpu_evidence`: run the stages, print the table, write the file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gptjet.benchmarks.gpu_evidence.bars import bars_table
from gptjet.benchmarks.gpu_evidence.runner import PASSED, run_all
from gptjet.benchmarks.gpu_evidence.stages import as_table, plan_stages
from gptjet.benchmarks.gpu_evidence.tables import batch_table, kernel_table, profile_table

_FILE = "gpu-evidence.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every stage passed, 1 not; the result file is written either way."""
    parser = argparse.ArgumentParser(prog="gpu_evidence", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try this command")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each cell")
    parser.add_argument("--stage-timeout-s", type=float, default=300.0)
    parser.add_argument("--deadline-s", type=float, default=570.0, help="for all stages together")
    names = [stage.name for stage in plan_stages(device="", tiny=True, repeats=1, timeout_s=1)]
    parser.add_argument("--stage", action="append", choices=names, help="only this one")
    parser.add_argument("--out", type=Path, help=f"result file; default {_FILE} under $OUT")
    flags = parser.parse_args(arguments)
    stages = plan_stages(
        device=flags.device,
        tiny=flags.tiny,
        repeats=flags.repeats,
        timeout_s=flags.stage_timeout_s,
    )
    if flags.stage:
        # What a chosen stage needs is still asked for: choose the parity stages with it.
        stages = tuple(stage for stage in stages if stage.name in flags.stage)
    if flags.device.startswith("cpu"):
        # Read when Triton is imported, by every process that a stage starts.
        os.environ["TRITON_INTERPRET"] = "1"
    result_file = flags.out or default_result_file()
    result = run_all(
        stages,
        result_file,
        command="gpu_evidence " + " ".join(sys.argv[1:] if arguments is None else arguments),
        deadline_s=flags.deadline_s,
        report=lambda line: print(line, flush=True),
    )
    records = [record for stage in result["stages"] for record in stage["records"]]
    for table in (
        as_table(result["summary"]),
        batch_table(records),
        kernel_table(records),
        profile_table(records),
        bars_table(result["bars"]),
    ):
        if table:
            print(f"{table}\n")
    print(f"written to {result_file}")
    return 0 if all(stage["status"] == PASSED for stage in result["stages"]) else 1


def default_result_file() -> Path:
    """Under $OUT where a device machine sets it, else benchmarks/results/, by its day."""
    out = os.environ.get("OUT")
    if out:
        return Path(out) / _FILE
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return Path("benchmarks") / "results" / f"gpu-evidence-{day}.json"


if __name__ == "__main__":
    sys.exit(main())
