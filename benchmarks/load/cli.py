"""`gptjet load`: from flags and a connection to runs, files, tables and an exit code."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from gptjet.benchmarks.environment import record_environment, utc_now
from gptjet.benchmarks.files import check_can_be_written
from gptjet.benchmarks.load import report
from gptjet.benchmarks.load.coordinator import (
    InterruptedBeforeStartError,
    LoadError,
    RunResult,
    StopRequest,
    run_load,
)
from gptjet.benchmarks.load.flags import FlagError, LoadFlags
from gptjet.benchmarks.load.generator import Counters
from gptjet.benchmarks.load.measures import summarize
from gptjet.benchmarks.load.plots import PlotError, check_can_draw, draw_run
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.search import (
    LIMITED_BY_STOP,
    Probe,
    RateFound,
    SearchOptions,
    find_rate,
)
from gptjet.benchmarks.load.slo import Slo
from gptjet.benchmarks.load.transport import tls_to_json
from gptjet.benchmarks.load.workload import WorkloadError, WorkloadSpec, plan_requests
from gptjet.service.client import ModelInfo, TlsOptions

# As gptjet.service.commands.terminal.ExitCode, which this room may not import.
OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

_DEFAULT_DURATION_S = 30.0
_DEFAULT_TIMEOUT_S = 300.0
_LOG_EVERY_S = 30.0


def make_spec(
    flags: LoadFlags, model: ModelInfo, target: str, timeout_s: float, tls: TlsOptions | None
) -> RunSpec:
    """What the flags ask for of this model. Raises FlagError and WorkloadError."""
    flags.check()
    duration_s = flags.duration
    if duration_s is None and flags.requests is None and flags.trace is None:
        duration_s = _DEFAULT_DURATION_S
    is_closed = flags.concurrency is not None
    workload = WorkloadSpec(
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        eos_token_id=model.eos_token_id,
        rate=None if is_closed or flags.trace else flags.rate or 1.0,
        arrivals=flags.arrivals,
        requests=flags.requests,
        duration_s=duration_s,
        prompt_tokens=flags.prompt_tokens,
        output_tokens=flags.output_tokens,
        prompts_file=_path(flags.prompts),
        trace_file=_path(flags.trace),
        trace_speed=flags.trace_speed,
        closed=is_closed,
        seed=flags.seed,
    )
    spec = RunSpec(
        target=target,
        workload=workload,
        concurrency=flags.concurrency,
        timeout_s=_DEFAULT_TIMEOUT_S if math.isinf(timeout_s) else timeout_s,
        warmup=flags.warmup,
        drain_s=flags.drain,
        processes=flags.processes,
        connections=flags.connections,
        tls=tls_to_json(tls),
    )
    # A file that cannot be read is said here, once, and not by every worker.
    next(plan_requests(workload), None)
    return spec


def run_command(flags: LoadFlags, spec: RunSpec, model: ModelInfo) -> int:
    """Make the run or the search, write and print it. Returns the exit code.

    Raises LoadError where it cannot be made, and OSError where a result cannot be written.
    """
    console = Console(stderr=flags.as_json)
    slo = Slo(flags.slo_ttft_ms, flags.slo_tpot_ms, flags.slo_e2e_ms)
    session: report.Record = (
        "load_session",
        {"environment": record_environment(), "model": dataclasses.asdict(model)},
    )
    path = flags.out or Path(f"load-{re.sub('[^0-9TZ]', '', utc_now()[:19])}Z.jsonl")
    # Before the run: what took so long to measure must not be lost for want of a folder.
    check_can_be_written(path)
    if flags.plot is not None:
        check_can_draw()
        check_can_be_written(flags.plot)
    if flags.find_rate:
        return _search(flags, spec, slo, session, path, console)
    result = asyncio.run(_run(spec))
    summary = summarize(result, slo)
    report.write_records(path, [session, *report.run_records(result, summary)])
    if flags.as_json:
        typer.echo(json.dumps(_without_histograms(summary.to_json()), indent=2))
    else:
        report.print_summary(console, summary)
        console.print(f"written: {path}", highlight=False, markup=False)
    if flags.plot:
        draw_run(result, flags.plot)
    if result.is_partial:
        return INTERRUPTED
    return OK if summary.succeeded else FAILURE


async def _run(spec: RunSpec) -> RunResult:
    stop = StopRequest()
    with stop.on_signals(), _Progress() as progress:
        return await run_load(spec, stop, progress.show)


def _search(
    flags: LoadFlags,
    spec: RunSpec,
    slo: Slo,
    session: report.Record,
    path: Path,
    console: Console,
) -> int:
    options = SearchOptions(
        attainment=flags.attainment,
        probes=flags.probes,
        tolerance=flags.tolerance,
        start_rate=flags.rate or 1.0,
        max_rate=flags.max_rate,
    )
    records: list[report.Record] = [session]
    try:
        found = asyncio.run(_find(spec, slo, options, records, console))
    except LoadError:
        # A server that is gone between two probes takes the earlier ones with it nowhere.
        if len(records) > 1:
            report.write_records(path, records)
            console.print(f"written, without a result: {path}", highlight=False, markup=False)
        raise
    records.append(("load_search", {"slo": dataclasses.asdict(slo), **found.to_json()}))
    report.write_records(path, records)
    if flags.as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        report.print_found(console, found, slo)
        console.print(f"written: {path}", highlight=False, markup=False)
    if found.limited_by == LIMITED_BY_STOP:
        return INTERRUPTED
    return OK if found.rate is not None else FAILURE


async def _find(
    spec: RunSpec,
    slo: Slo,
    options: SearchOptions,
    records: list[report.Record],
    console: Console,
) -> RateFound:
    stop = StopRequest()
    made = itertools.count()

    async def probe(rate: float, number: int) -> Probe | None:
        # Every probe has arrivals and prompts of its own, also beside those of other rates: luck
        # must not repeat itself, nor a prefix cache answer for the second rate.
        workload = dataclasses.replace(
            spec.workload, rate=rate, seed=spec.workload.seed + 1000 * next(made)
        )
        if stop.is_set:
            return None
        result = await run_load(dataclasses.replace(spec, workload=workload), stop, progress.show)
        if result.is_partial:
            return None
        summary = summarize(result, slo)
        records.extend(report.run_records(result, summary, rate=rate, probe=number))
        return Probe(rate, summary.attainment, summary.requests, summary.is_valid)

    with stop.on_signals(), _Progress() as progress:
        return await find_rate(
            probe, options, lambda verdict: report.print_verdict(console, verdict)
        )


class _Progress:
    """One line on stderr that is drawn over where that is a terminal; in a log, a line at times."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._is_shown = self._console.is_terminal
        self._next_line_s = 0.0

    def show(self, counters: Counters, elapsed_s: float) -> None:
        """Draw it anew."""
        if self._is_shown:
            self._live.update(Text(report.progress_line(counters, elapsed_s)), refresh=True)
        elif elapsed_s >= self._next_line_s:
            self._next_line_s = elapsed_s + _LOG_EVERY_S
            line = report.progress_line(counters, elapsed_s)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> _Progress:
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._live.stop()


def _without_histograms(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures alone; the file has the histograms too."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: plain(each) for name, each in value.items() if name != "histogram_ns"}

    made: dict[str, Any] = plain(summary)
    return made


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


__all__ = [
    "FAILURE",
    "USAGE",
    "FlagError",
    "InterruptedBeforeStartError",
    "LoadError",
    "LoadFlags",
    "PlotError",
    "WorkloadError",
    "make_spec",
    "run_command",
]
