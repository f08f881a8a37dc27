"""What a report says of result files whose latencies are known, and how its files are made."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gptjet.benchmarks.records import Results
from gptjet.benchmarks.report.analysis import Analysis, analyse
from gptjet.benchmarks.report.build import ReportError, write_report
from gptjet.benchmarks.report.cost import compare, crossovers, prices, usd_per_million
from gptjet.benchmarks.report.words import interval_text, number, percent, with_sd
from gptjet.benchmarks.results import ResultsError
from gptjet.benchmarks.statistics import Interval

ResultFile = Callable[..., Path]
T4 = {"huggingface/fp16": (80.0, 2.0), "deepspeed/fp16": (60.0, 1.0)}
V100 = {"huggingface/fp16": (40.0, 0.1), "deepspeed/fp16": (20.0, 0.1)}
FAILURE = (
    "failure",
    {
        "backend": "deepspeed",
        "weight_type": "fp16",
        "input_tokens": 50,
        "output_tokens": 50,
        "run": 99,
        "error": "UNAVAILABLE: <b>gone</b> | away",
    },
)
INFEASIBLE = (
    "infeasible",
    {
        "backend": "deepspeed",
        "weight_type": "fp16",
        "input_tokens": 2000,
        "output_tokens": 50,
        "reason": "not feasible: prompt + output > context (2000 + 50 > 2048)",
    },
)


def analysis_of(*files: Path) -> Analysis:
    return analyse(Results.read(files))


def test_files_of_several_machines_are_merged(write_results: ResultFile) -> None:
    files = (write_results("a", levels=T4), write_results("b", config="v100", levels=V100))
    analysis = analysis_of(*files)
    assert [str(machine) for machine in analysis.machines] == ["t4, gpt-j-6b", "v100, gpt-j-6b"]
    assert len(analysis.cells) == 64
    assert {cell.e2e.n for cell in analysis.cells} == {5}


def test_a_cell_is_its_samples(write_results: ResultFile) -> None:
    """80 ms a token, 2 ms a 10 prompt tokens, half a ms for the end, 2 % of noise."""
    cell = next(
        cell
        for cell in analysis_of(write_results("a", levels=T4, runs=40)).cells
        if cell.lengths == (50, 100) and cell.level.backend == "huggingface"
    )
    values = np.array([sample.e2e_ms for sample in cell.samples])
    assert cell.e2e.mean == pytest.approx(values.mean())
    assert cell.e2e.mean == pytest.approx(80 * 100 + 10 + 0.5, rel=0.02)
    assert cell.e2e.p95 == pytest.approx(np.percentile(values, 95))
    assert cell.tokens_per_s == pytest.approx(np.mean(100_000 / values))
    assert cell.tokens_per_s_sd == pytest.approx(np.std(100_000 / values, ddof=1))
    assert cell.tpot is not None
    assert cell.tpot.mean == pytest.approx(80, rel=0.02)
    assert cell.ttft.mean == pytest.approx(90, rel=0.02)


def test_reductions_are_against_the_baseline_of_the_same_machine(
    write_results: ResultFile,
) -> None:
    files = (write_results("a", levels=T4), write_results("b", config="v100", levels=V100))
    analysis = analysis_of(*files)
    assert len(analysis.reductions) == 32
    for one in analysis.reductions:
        assert one.cell.machine == one.baseline.machine
        assert one.cell.lengths == one.baseline.lengths
        assert str(one.baseline.level) == "huggingface/fp16"
        assert one.interval.low <= one.interval.estimate <= one.interval.high
    level = next(x for x in analysis.levels if str(x.level) == "deepspeed/fp16")
    assert level.reduction is not None
    # 1 - 60/80 within the noise; the mean of the cells' reductions.
    assert level.reduction.estimate == pytest.approx(0.25, abs=0.03)
    assert set(level.reduction_by_input) == {50, 200, 500, 1000}
    assert np.mean(list(level.reduction_by_input.values())) == pytest.approx(
        level.reduction.estimate
    )


def test_the_same_run_in_two_files_counts_once(write_results: ResultFile) -> None:
    first = write_results("a", levels=T4)
    again = Results.read([first, first])
    assert (len(again.samples), again.duplicates) == (160, 0)
    other = Results.read([first, write_results("b", levels=T4)])
    assert (len(other.samples), other.duplicates) == (160, 160)


def test_floors_are_modelled_by_datasheet_and_by_measured_rates(
    write_results: ResultFile,
) -> None:
    rates = {"read_gb_s": 160.0, "copy_gb_s": 150.0, "matrix_tflops": {"fp16": 30.0}}
    analysis = analysis_of(write_results("a", levels=T4, bandwidth=rates))
    by_basis = {
        basis: {
            (f.cell.lengths, str(f.cell.level)): f
            for f in analysis.floors
            if f.floor.basis == basis
        }
        for basis in ("datasheet", "measured")
    }
    assert {len(found) for found in by_basis.values()} == {32}
    for place, floor in by_basis["datasheet"].items():
        # Half the datasheet's bandwidth: twice the time of a step, which is bound by it.
        measured = by_basis["measured"][place]
        assert measured.floor.tpot_ms == pytest.approx(2 * floor.floor.tpot_ms)
        assert floor.share == pytest.approx(floor.floor.e2e_ms / floor.cell.e2e.mean)
        assert 0.3 < floor.share < 1


def test_cost_by_hand() -> None:
    """3.60 USD an hour are 0.001 USD a second; 10 tokens/s need 100,000 s for a million."""
    assert usd_per_million(3.6, 10) == pytest.approx(100)


def crossing(write_results: ResultFile, prompt_ms: float) -> Analysis:
    """50 tokens in, no noise. T4: 10 n + 5 x prompt_ms + 0.5 ms; V100: 6 n + 1 ms."""
    level = "huggingface/fp16"
    common = {"inputs": [50], "runs": 3, "noise_sd": 0.0}
    return analysis_of(
        write_results("a", levels={level: (10.0, prompt_ms)}, **common),
        write_results("b", config="v100", levels={level: (6.0, 0.1)}, **common),
    )


def test_cards_are_compared_at_their_prices(write_results: ResultFile) -> None:
    analysis = crossing(write_results, 50.0)
    comparisons = compare(analysis, prices(analysis, {"t4": 1.0, "v100": 2.0}))
    assert len(comparisons) == 4
    for one in comparisons:
        # At its break-even price the V100 costs what the T4 costs.
        assert one.right_usd / 2.0 * one.break_even_usd == pytest.approx(one.left_usd)
        assert one.cheaper == ("t4" if one.left_usd < one.right_usd else "v100")
    assert {one.cheaper for one in comparisons} == {"t4", "v100"}


def test_the_crossover_between_cards_is_where_their_costs_meet(write_results: ResultFile) -> None:
    """At 1 and 2 USD/h: 10 n + 250.5 = 2 (6 n + 1) at n = 124.25 output tokens."""
    analysis = crossing(write_results, 50.0)
    (found,) = crossovers(compare(analysis, prices(analysis, {"t4": 1.0, "v100": 2.0})))
    assert found.cheaper_at_first == "v100"
    assert found.output_tokens == pytest.approx(124.25)


def test_cards_that_never_cross_say_so(write_results: ResultFile) -> None:
    """10 n + 1000.5 = 2 (6 n + 1) at n = 499.25, beyond the 200 that were measured."""
    analysis = crossing(write_results, 200.0)
    (found,) = crossovers(compare(analysis, prices(analysis, {"t4": 1.0, "v100": 2.0})))
    assert (found.cheaper_at_first, found.output_tokens) == ("v100", None)


def test_configured_prices_are_used_where_none_is_given(write_results: ResultFile) -> None:
    found = prices(analysis_of(write_results("a", levels=T4)), {})
    assert found["t4"].usd_per_hour == 0.94
    assert (found["t4"].instance, found["t4"].as_of) == ("ml.g4dn.2xlarge", "2025")


@pytest.fixture(scope="module")
def report(write_shared_results: ResultFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [
        write_shared_results("a", levels=T4, extra=[FAILURE, INFEASIBLE]),
        write_shared_results("b", config="v100", levels=V100),
    ]
    folder = tmp_path_factory.mktemp("report")
    write_report(files, folder)
    return folder


class _Page(HTMLParser):
    """The tables of a page, its addresses, and whether every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br", "link"}:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "data"} and value:
                self.addresses.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells.append(data)


def test_the_html_is_one_file_that_needs_no_network(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("#") for address in page.addresses)
    assert {address[1:] for address in page.addresses} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids)), "plots in one page share no id"
    assert not re.search(r"@import|<script|<link", text)
    assert not re.search(r"url\((?!#)", text)
    assert text.count("<svg") == 7


def test_what_others_wrote_is_escaped(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;gone&lt;/b&gt;" in html
    assert "<b>gone" not in html
    markdown = (report / "report.md").read_text(encoding="utf-8")
    assert r"\<b>gone\</b> \| away" in markdown


def test_published_figures_stand_beside_ours_and_are_marked(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "published: tokens/s (SD) |" in text
    assert "measured here: tokens/s (SD) |" in text
    for figures in ("12.5 (0.91)", "16.5 (2.13)", "21.9 (1.97)", "47.5 (5.8)"):
        assert f"| {figures} |" in text
    assert "24.0 % (5.0 %) | 31.0 % at 50, 15.0 % at 1000" in text
    assert "53.0 % (7.0 %) | 62.0 % at 50, 40.0 % at 1000" in text
    assert "280 ms a step is quoted" in text


def test_measured_and_modelled_never_share_a_column(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\*\*.+\*\* \((\w+)\)\n\n(\|.+\|)$", text, re.MULTILINE)
    assert {kind for kind, _ in tables} == {
        *("measured", "published", "modelled", "derived", "recorded"),
    }
    for kind, header in tables:
        columns = [name.strip() for name in header.strip("|").split("|")]
        modelled = [name for name in columns if name.startswith("modelled")]
        assert bool(modelled) == (kind == "modelled"), header
        if kind == "modelled":
            factors = {"hardware", "model", "weights", "input", "output", "a step is bound by"}
            assert set(columns) == {*factors, *modelled}
    with (report / "cells.csv").open(encoding="utf-8") as file:
        names = csv.DictReader(file).fieldnames or ()
    assert [name for name in names if "floor" in name] == [
        "modelled_datasheet_floor_e2e_ms",
        "modelled_measured_rates_floor_e2e_ms",
    ]


def test_failures_and_cells_that_cannot_run_are_listed(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "1 run failed" in text
    assert "prompt + output > context (2000 + 50 > 2048)" in text


@pytest.mark.parametrize(("load", "is_told"), [("0.1", False), ("7.5", True)])
def test_a_machine_that_was_busy_is_told(
    write_results: ResultFile, tmp_path: Path, load: str, is_told: bool
) -> None:
    """The invented machine has two cores; a server alone can load it with two."""
    file = write_results("a", levels=T4, inputs=[50], outputs=[50])
    file.write_text(file.read_text().replace('"load": 0.1', f'"load": {load}'))
    write_report([file], tmp_path / "out", with_plots=False)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert ("other work ran on this machine (median load 7.5 on 2 cores)" in text) == is_told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("Invented CPU", "Other CPU"), "(Invented CPU, 2 cores; Other CPU, 2 cores)"),
        (('"identity": {}', '"identity": {"seed": 8}'), "of different sweeps (another seed)"),
        (("", ""), None),
    ],
)
def test_files_of_two_machines_or_sweeps_under_one_name_are_told(
    write_results: ResultFile, tmp_path: Path, change: tuple[str, str], words: str | None
) -> None:
    """A label such as "cpu" stands for any: one's baseline must not pass for the other's."""
    fast = {"fused/fp32": (10.0, 1.0)}
    slow = {"huggingface/fp32": (50.0, 1.0)}
    files = [
        write_results(name, config="cpu", levels=levels, inputs=[50], outputs=[50])
        for name, levels in (("a", slow), ("b", fast))
    ]
    text = files[1].read_text(encoding="utf-8")
    assert change[0] in text
    files[1].write_text(text.replace(*change), encoding="utf-8")
    write_report(files, tmp_path / "out", with_plots=False)
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    if words is None:
        assert "different machines" not in markdown
        assert "different sweeps" not in markdown
    else:
        assert words in markdown


def test_csv_and_parquet_hold_the_same_cells_and_every_latency(report: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = parquet.read_table(report / "cells.parquet").to_pylist()
    with (report / "cells.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(cells) == len(rows) == 64
    for cell, row in zip(cells, rows, strict=True):
        assert float(row["mean_e2e_ms"]) == cell["mean_e2e_ms"]
    samples = parquet.read_table(report / "samples.parquet").to_pylist()
    assert len(samples) == 320
    assert all(len(s["itl_ms"]) == s["output_tokens"] - 1 for s in samples)


def test_plots_are_png_and_svg_with_the_machine_in_their_name(report: Path) -> None:
    names = {file.name for file in (report / "plots").iterdir()}
    expected = {
        f"{plot}-{card}-gpt-j-6b"
        for plot in ("latency", "split", "reduction")
        for card in ("t4", "v100")
    } | {"cost"}
    assert names == {f"{name}.{ending}" for name in expected for ending in ("png", "svg")}
    for file in (report / "plots").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_same_results_give_the_same_report(write_results: ResultFile, tmp_path: Path) -> None:
    file = write_results("a", levels=T4, outputs=[50], inputs=[50])
    for name in ("one", "two"):
        write_report([file], tmp_path / name)
    for path in ("report.html", "report.md", "cells.csv", "plots/latency-t4-gpt-j-6b.svg"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ReportError, match="no measured run"):
        write_report([empty], tmp_path / "out")
    with pytest.raises(ResultsError, match="No such file"):
        write_report([tmp_path / "missing.jsonl"], tmp_path / "out")


def test_a_report_that_cannot_be_written_is_an_error_that_names_the_file(
    write_results: ResultFile, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "report"
    in_the_way.write_text("mine", encoding="utf-8")
    with pytest.raises(ReportError, match=r"report\.md cannot be written: "):
        write_report([write_results("a", levels=T4)], in_the_way, with_plots=False)
    assert in_the_way.read_text(encoding="utf-8") == "mine"


def test_a_report_that_is_cut_off_leaves_no_half_file(
    write_results: ResultFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the temporary file and its name: the old report stands, nothing lies about."""
    files = [write_results("a", levels=T4)]
    folder = tmp_path / "out"
    write_report(files, folder, with_plots=False)
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report([write_results("b", levels=V100)], folder, with_plots=False)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_record_that_lacks_a_field_is_named(write_results: ResultFile, tmp_path: Path) -> None:
    file = write_results("a", levels=T4, inputs=[50], outputs=[50])
    lines = file.read_text().splitlines()
    record = json.loads(lines[1])
    del record["ttft_ms"]
    file.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")
    with pytest.raises(ResultsError, match=r"record 2 \(sample\): ttft_ms"):
        write_report([file], tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (None, ""),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_and_intervals_read_as_percent() -> None:
    assert percent(0.2449) == "24.5 %"
    assert with_sd(16.5, 2.13) == "16.5 (2.13)"
    assert interval_text(Interval(0.24, 0.2, 0.281)) == "24.0 % [20.0, 28.1]"
    assert interval_text(Interval(0.24, math.nan, math.nan)) == "24.0 % [one run: no interval]"
