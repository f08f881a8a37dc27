"""python -m gptjet.benchmarks.kernels_report: report.md and report.json, without a card."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gptjet.benchmarks.files import write_atomically
from gptjet.benchmarks.kernels_report.collect import (
    CollectError,
    Compiled,
    Worker,
    as_record,
    collect,
    list_jobs,
)
from gptjet.benchmarks.kernels_report.report import markdown, problems
from gptjet.kernels.gpu.compile_case import CAPABILITIES, MODULES

_DEFAULT_FOLDER = Path("build/kernels-report")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m gptjet.benchmarks.kernels_report")
    parser.add_argument("--output", type=Path, default=_DEFAULT_FOLDER, metavar="FOLDER")
    parser.add_argument("--module", action="append", choices=MODULES, help="only this one")
    parser.add_argument("--capability", action="append", type=int, choices=CAPABILITIES)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compiling processes")
    parser.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="seconds a kernel may take"
    )
    parser.add_argument("--quiet", action="store_true", help="print problems and one line only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every kernel is clean, 1 with a line for each problem, 2 where nothing was made."""
    options = build_parser().parse_args(arguments)
    console = Console(stderr=True)
    if importlib.util.find_spec("triton") is None:
        console.print("Triton is not installed: pip install -r requirements/triton.txt")
        return 2
    started = time.monotonic()
    lister = Worker()
    try:
        jobs = list_jobs(lister, options.timeout)
    except CollectError as error:
        console.print(str(error), markup=False)
        return 2
    finally:
        lister.close()
    jobs = [
        job
        for job in jobs
        if job["module"] in (options.module or MODULES)
        and job["capability"] in (options.capability or CAPABILITIES)
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    with Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=len(jobs))
        lock = threading.Lock()

        def done(_: Compiled) -> None:
            with lock:
                progress.advance(task)

        compiled = collect(
            jobs,
            options.output / "cache",
            num_workers=options.jobs,
            timeout_s=options.timeout,
            on_done=done,
        )
    text = markdown(compiled)
    write_atomically(options.output / "report.md", text)
    records = {"kernels": [as_record(one) for one in compiled], "problems": problems(compiled)}
    write_atomically(options.output / "report.json", json.dumps(records, indent=1) + "\n")
    if not options.quiet:
        sys.stdout.write(text)
    found = problems(compiled)
    for line in found:
        console.print(line, markup=False, highlight=False)
    seconds = time.monotonic() - started
    console.print(
        f"{len(compiled)} kernels compiled, {len(found)} problems, {seconds:.0f} s", highlight=False
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
