"""Figures of invented samples, calculated by hand; goodput; validity; what is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptjet.benchmarks.load.check_clock import compare
from gptjet.benchmarks.load.coordinator import RunResult
from gptjet.benchmarks.load.histogram import RELATIVE_ERROR, Histogram
from gptjet.benchmarks.load.measures import CLOSED_LOOP_NOTE, is_supported, summarize
from gptjet.benchmarks.load.report import print_summary, run_records, write_records
from gptjet.benchmarks.load.run_spec import RunSpec
from gptjet.benchmarks.load.samples import Sample
from gptjet.benchmarks.load.slo import Slo, measure_goodput
from gptjet.benchmarks.load.validity import WorkerHealth
from gptjet.benchmarks.load.workload import WorkloadSpec
from gptjet.benchmarks.results import read_records

MS = 1_000_000
WORK = WorkloadSpec(vocab_size=100, max_context=64, rate=2.0, duration_s=10.0)
SPEC = RunSpec(target="gpu-box.example:50051", workload=WORK)


def sample(index: int = 0, **changes: Any) -> Sample:
    """Sent at 1000 ms; tokens at 1100, 1120 and 1150; ended at 1151."""
    made = Sample(
        index=index,
        intended_ns=1000 * MS,
        sent_ns=1001 * MS,
        ended_ns=1151 * MS,
        arrivals=((1100 * MS, 1), (1120 * MS, 1), (1150 * MS, 1)),
        status="OK",
        prompt_tokens=5,
        asked_tokens=3,
    )
    return dataclasses.replace(made, **changes)


def healthy(lag_ms: float = 0.5, cpu_share: float = 0.1) -> WorkerHealth:
    lag = Histogram()
    lag.record(round(lag_ms * MS))
    return WorkerHealth(lag, cpu_share)


def result(*samples: Sample, spec: RunSpec = SPEC, **changes: Any) -> RunResult:
    made = RunResult(spec, "2026-01-02T03:04:05Z", samples, (healthy(),), 10_000 * MS, False)
    return dataclasses.replace(made, **changes)


def about(ms: float) -> Any:
    return pytest.approx(ms, rel=RELATIVE_ERROR)


def test_latencies_are_those_of_the_sample() -> None:
    """TTFT 1100 - 1000, gaps 20 and 30, TPOT 50 / 2, E2E 1151 - 1000."""
    latencies = summarize(result(sample()), Slo()).latencies
    means = {name: each.mean for name, each in latencies.items()}
    assert means == {"ttft": 100, "tpot": 25, "itl": 25, "e2e": 151}
    assert latencies["itl"].count == 2
    assert latencies["ttft"].percentiles["p50"] is None  # of one value, no half lies beyond


def test_percentiles_are_of_all_requests_that_succeeded() -> None:
    samples = [sample(i, arrivals=((1000 * MS + i * MS, 1), (1200 * MS, 2))) for i in range(1, 101)]
    failed = sample(101, status="INTERNAL", arrivals=())
    ttft = summarize(result(*samples, failed), Slo()).latencies["ttft"]
    assert ttft.count == 100
    assert ttft.percentiles["p50"] == about(50)
    assert ttft.percentiles["p99"] == about(99)
    assert ttft.percentiles["p99.9"] is None


@pytest.mark.parametrize(("q", "enough"), [(50.0, 2), (90.0, 10), (99.0, 100), (99.9, 1000)])
def test_a_percentile_needs_one_value_beyond_it(q: float, enough: int) -> None:
    assert is_supported(q, enough)
    assert not is_supported(q, enough - 1)


def test_rates_count_what_happened_within_the_window() -> None:
    """Window 1130 ms: two of the three tokens came in it, and the request ended after it."""
    summary = summarize(result(sample(), window_ns=1130 * MS), Slo())
    assert summary.output_tokens_rate == pytest.approx(2 / 1.13)
    assert summary.sent_rate == pytest.approx(1 / 1.13)
    assert summary.succeeded_rate == 0
    assert summary.output_tokens == 3


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (Slo(), True),
        (Slo(ttft_ms=100), True),
        (Slo(ttft_ms=99.9), False),
        (Slo(tpot_ms=25), True),
        (Slo(tpot_ms=24.9), False),
        (Slo(e2e_ms=151), True),
        (Slo(e2e_ms=150.9), False),
        (Slo(ttft_ms=100, tpot_ms=25, e2e_ms=1), False),
    ],
)
def test_an_slo_is_met_within_all_of_its_limits(slo: Slo, is_met: bool) -> None:
    assert slo.is_met_by(sample()) == is_met


def test_failed_and_unfinished_requests_miss_the_slo_and_interrupted_ones_do_not_count() -> None:
    samples = [
        sample(0),
        sample(1, status="UNAVAILABLE", arrivals=()),
        sample(2, status="UNFINISHED"),
        sample(3, status="INTERRUPTED"),
    ]
    goodput = measure_goodput(samples, Slo())
    assert (goodput.counted, goodput.met, goodput.attainment) == (3, 1, pytest.approx(1 / 3))
    summary = summarize(result(*samples), Slo())
    assert summary.statuses == {"OK": 1, "UNAVAILABLE": 1, "UNFINISHED": 1}
    assert (summary.requests, summary.interrupted, summary.goodput) == (3, 1, pytest.approx(0.1))
    assert any("failed and are in no latency" in note for note in summary.notes)
    assert any("did not keep up" in note for note in summary.notes)


def test_one_token_has_no_tpot_to_miss() -> None:
    one = sample(arrivals=((1100 * MS, 1),))
    assert one.tpot_ns is None
    assert Slo(tpot_ms=0.001).is_met_by(one)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, set()),
        ({"workers": (healthy(), healthy(lag_ms=40))}, {"event-loop lag p99"}),
        ({"workers": (healthy(), healthy(cpu_share=0.95))}, {"CPU of the busiest client process"}),
        (
            {"samples": (sample(), sample(1, sent_ns=1006 * MS))},
            {"requests sent more than 5 ms late"},
        ),
        ({"workers": ()}, {"event-loop lag p99", "CPU of the busiest client process"}),
    ],
)
def test_a_client_that_was_not_fit_says_so(changes: dict[str, Any], broken: set[str]) -> None:
    summary = summarize(
        result(**{"samples": (sample(),)} | changes) if changes else result(sample()), Slo()
    )
    assert {check.name for check in summary.checks if not check.holds} == broken
    assert summary.is_valid == (not broken)
    assert len([note for note in summary.notes if note.startswith("Not valid")]) == len(broken)


def test_a_closed_loop_says_what_its_figures_do_not_mean() -> None:
    closed = dataclasses.replace(SPEC, concurrency=4)
    summary = summarize(result(sample(), spec=closed), Slo())
    assert (summary.mode, summary.notes[0], summary.late_ms) == ("closed", CLOSED_LOOP_NOTE, None)


def test_a_partial_run_is_marked_in_the_figures_the_file_and_the_table(tmp_path: Path) -> None:
    made = result(sample(), is_partial=True)
    summary = summarize(made, Slo(ttft_ms=1.0))
    console = Console(record=True, width=100, file=(tmp_path / "out").open("w"))
    print_summary(console, summary)
    text = console.export_text()
    assert "PARTIAL" in text
    assert "0.0 % meet TTFT <= 1 ms" in text
    path = tmp_path / "results" / "load.jsonl"
    write_records(path, run_records(made, summary))
    run, request, figures = read_records(path)
    assert (run["kind"], request["kind"], figures["kind"]) == (
        "load_run",
        "load_request",
        "load_summary",
    )
    assert figures["is_partial"] is True
    assert Sample.from_json(request) == sample()


def test_a_result_file_names_no_machine_and_no_folder(tmp_path: Path) -> None:
    work = dataclasses.replace(WORK, prompts_file="/home/someone/prompts.txt")
    spec = dataclasses.replace(SPEC, workload=work, tls={"root_ca": "/home/someone/ca.pem"})
    made = result(sample(), spec=spec)
    text = json.dumps(run_records(made, summarize(made, Slo())))
    assert "someone" not in text
    assert "example" not in text
    assert "prompts.txt" in text


def test_a_result_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON"):
        write_records(path, [("a", {"value": float("nan")})])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(("ttft_ms", "holds"), [(95.1, True), (105.1, False), (94.9, False)])
def test_the_clock_check_allows_five_percent(ttft_ms: float, holds: bool) -> None:
    arrivals = ((round((1000 + ttft_ms) * MS), 1), (round((1020 + ttft_ms) * MS), 1))
    server = {"ttft_ms": 99.0, "decode_ms": 19.5}
    samples = [sample(i, arrivals=arrivals, server=server) for i in range(10)]
    ttft, itl = compare(result(*samples), prefill_ms=100, decode_ms=20)
    assert (ttft.server_ms, itl.server_ms) == (99.0, 19.5)
    assert (ttft.measure, ttft.holds) == ("ttft", holds)
    assert (itl.measure, itl.holds) == ("itl", True)
