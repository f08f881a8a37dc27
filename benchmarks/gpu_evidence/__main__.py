"""`python -m gptjet.benchmarks.gpu_evidence`: run the stages, print the table, write the file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from gptjet.benchmarks.gpu_evidence.runner import PASSED, run_all
from gptjet.benchmarks.gpu_evidence.stages import as_table, plan_stages

_FILE = "gpu-evidence.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 every stage passed, 1 not; the result file is written either way."""
    parser = argparse.ArgumentParser(prog="gpu_evidence", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a toy geometry, to try this command")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each cell")
    parser.add_argument("--stage-timeout-s", type=float, default=300.0)
    parser.add_argument("--deadline-s", type=float, default=570.0, help="for all stages together")
    parser.add_argument("--out", type=Path, help=f"result file; default {_FILE} under $OUT")
    flags = parser.parse_args(arguments)
    stages = plan_stages(
        device=flags.device,
        tiny=flags.tiny,
        repeats=flags.repeats,
        timeout_s=flags.stage_timeout_s,
    )
    result_file = flags.out or default_result_file()
    result = run_all(
        stages,
        result_file,
        command="gpu_evidence " + " ".join(sys.argv[1:] if arguments is None else arguments),
        deadline_s=flags.deadline_s,
        report=lambda line: print(line, flush=True),
    )
    print(as_table(result["summary"]))
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
