"""What a run leaves: a result file, a table for the terminal, a line while it lasts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from gptjet.benchmarks.files import write_atomically
from gptjet.benchmarks.load.coordinator import RunResult
from gptjet.benchmarks.load.generator import Counters
from gptjet.benchmarks.load.measures import PERCENTILES, Distribution, Summary
from gptjet.benchmarks.load.search import (
    LIMITED_BY_BOUND,
    LIMITED_BY_CLIENT,
    LIMITED_BY_SERVER,
    RateFound,
    Verdict,
)
from gptjet.benchmarks.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from rich.console import Console

_TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}
_LIMITS = {
    LIMITED_BY_SERVER: "above it the server misses the SLO",
    LIMITED_BY_CLIENT: "this client cannot send faster: use more --processes",
    LIMITED_BY_BOUND: "it is --max-rate; the server may do more",
}

Record = tuple[str, Mapping[str, Any]]


def run_records(result: RunResult, summary: Summary, **of: Any) -> list[Record]:
    """A run as records of a result file: what was asked for, every request, the figures."""
    spec = {**result.spec.to_json(), "tls": result.spec.tls is not None}
    run = {"started_at": result.started_at, "spec": without_addresses(spec), **of}
    return [
        ("load_run", run),
        *(("load_request", {**of, **sample.to_json()}) for sample in result.samples),
        ("load_summary", {**of, **summary.to_json()}),
    ]


def without_addresses(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec without what names a machine or a folder: results are made to be shared."""
    workload = dict(spec["workload"])
    for name in ("prompts_file", "trace_file"):
        if workload[name]:
            workload[name] = Path(workload[name]).name
    host = str(spec["target"]).rpartition(":")[0]
    is_here = host in {"127.0.0.1", "localhost", "[::1]"}
    return {**spec, "workload": workload, "target": "this machine" if is_here else "remote"}


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a result file that `results.read_records` reads: all of it, or nothing. Raises OSError.

    It is written at the end, unlike a sweep's: a disk must not be waited for while tokens arrive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps(
            {"schema": SCHEMA_VERSION, "kind": kind, **fields},
            separators=(",", ":"),
            allow_nan=False,
        )
        for kind, fields in records
    )
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def progress_line(counters: Counters, elapsed_s: float) -> str:
    """How far a run is, on one line."""
    rate = counters.tokens / elapsed_s if elapsed_s > 0 else 0.0
    return (
        f"{elapsed_s:6.1f} s  {counters.sent} sent, {counters.in_flight} running, "
        f"{counters.done} done, {counters.failed} failed, {rate:.1f} tokens/s"
    )


def print_summary(console: Console, summary: Summary) -> None:
    """The figures of one run."""
    partial = "  PARTIAL" if summary.is_partial else ""
    offered = "" if summary.offered_rate is None else f", {summary.offered_rate:g} requests/s asked"
    console.print(
        f"{summary.mode} loop, {summary.window_s:.1f} s{offered}{partial}", highlight=False
    )
    console.print(_latency_table(summary))
    rows = [
        ("requests", f"{summary.requests}, {summary.succeeded} succeeded{_statuses(summary)}"),
        (
            "rate",
            f"{summary.sent_rate:.3g} sent/s, {summary.succeeded_rate:.3g} ended/s, "
            f"{summary.output_tokens_rate:.1f} output tokens/s",
        ),
        ("tokens", f"{summary.prompt_tokens} in, {summary.output_tokens} out"),
        (
            "goodput",
            f"{summary.goodput:.3g} requests/s; {100 * summary.attainment:.1f} % "
            + ("are answered" if summary.slo.is_empty else f"meet {summary.slo}"),
        ),
    ]
    if summary.late_ms is not None:
        rows.append(
            (
                "sent late",
                f"{summary.late} of {summary.requests + summary.interrupted}; "
                f"delay {_distribution_words(summary.late_ms)}",
            )
        )
    for check in summary.checks:
        state = "ok" if check.holds else "NOT VALID"
        rows.append(
            (
                "client",
                f"{check.name}: {check.value:.3g} (limit {check.limit:g} {check.unit}) {state}",
            )
        )
    for name, value in rows:
        console.print(f"{name:<10} {value}", highlight=False, markup=False)
    for note in summary.notes:
        console.print(f"- {note}", highlight=False, markup=False, style="dim")


def print_verdict(console: Console, verdict: Verdict) -> None:
    """One rate of a search."""
    attained = ", ".join(f"{100 * probe.attainment:.1f} %" for probe in verdict.probes)
    word = "holds" if verdict.holds else "fails"
    console.print(
        f"{verdict.rate:10.3f} requests/s  {word}  ({attained})", highlight=False, markup=False
    )


def print_found(console: Console, found: RateFound, slo: object) -> None:
    """The end of a search."""
    goal = f"{100 * found.attainment:g} % of requests within {slo}"
    if found.rate is None:
        console.print(f"no rate was found that gives {goal}", highlight=False, markup=False)
        return
    above = "" if found.failed_rate is None else f"; {found.failed_rate:.3f} fails"
    reason = _LIMITS.get(found.limited_by, "the search was ended early: it may be higher")
    console.print(
        f"{found.rate:.3f} requests/s give {goal}{above} ({reason})",
        highlight=False,
        markup=False,
    )


def _latency_table(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms")
    for name in ("n", "mean", *(f"p{q:g}" for q in PERCENTILES), "max"):
        table.add_column(name, justify="right")
    for name, each in summary.latencies.items():
        values = [each.mean, *each.percentiles.values(), each.maximum]
        table.add_row(_TITLES[name], str(each.count), *map(_ms, values))
    return table


def _ms(value: float | None) -> str:
    """A dash where there are too few values for the percentile."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def _statuses(summary: Summary) -> str:
    words = "".join(f", {count} {name}" for name, count in summary.statuses.items() if name != "OK")
    return words + (f", {summary.interrupted} interrupted" if summary.interrupted else "")


def _distribution_words(each: Distribution) -> str:
    return f"mean {each.mean:.2f} ms, max {each.maximum:.2f} ms"
