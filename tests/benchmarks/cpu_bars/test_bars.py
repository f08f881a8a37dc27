"""Bars: which ratio each asks for, and the verdict on it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from gptjet.benchmarks.cpu_bars.bars import Bar, Bars, Verdict
from gptjet.benchmarks.cpu_bars.checkpoints import MODELS
from gptjet.benchmarks.cpu_bars.design import CellKind, Entry, make_races
from gptjet.benchmarks.cpu_bars.report import (
    bandwidth_share,
    cell_of,
    make_document,
    print_document,
)
from gptjet.benchmarks.cpu_bars.runner import Recorded
from gptjet.benchmarks.report.markdown import render

OURS, SERVER, REFERENCE = "engine:fused", "gptjet:fused", "engine:huggingface/fp32"


class File:
    """Rounds on file, put there by hand."""

    def __init__(self, *models: str) -> None:
        self.races = make_races(models)
        self.recorded = Recorded()

    def put(self, model: str, kind: CellKind, name: str, *figures: dict[str, Any]) -> None:
        """Figures of round 0, 1, ..."""
        race = next(
            r
            for r in self.races
            if r.model == model
            and name in {str(e) for e in r.entries}
            and kind in {cell.kind for cell in r.cells}
        )
        for number, values in enumerate(figures):
            key = (race.key, cell_of(race, kind).key, number)
            self.recorded.rounds.setdefault(key, {})[name] = values

    def decode(self, model: str, name: str, *rates: float, **more: Any) -> None:
        """Rounds of decode at these tokens a second."""
        fixed = {"ttft_ms": 1.0, "tokens": [1, 2], "peak_memory_bytes": 2**30, **more}
        figures = [{"tokens_per_s": rate, **fixed} for rate in rates]
        self.put(model, CellKind.DECODE, name, *figures)

    def prefill(self, model: str, name: str, *times_ms: float) -> None:
        """Rounds of prefill that took so long."""
        fixed = {"tokens_per_s": None, "tokens": [1], "peak_memory_bytes": 2**29}
        figures = [{"ttft_ms": ms, **fixed} for ms in times_ms]
        self.put(model, CellKind.PREFILL, name, *figures)

    @property
    def bars(self) -> Bars:
        return Bars(self.races, self.recorded, "fused")

    def bar(self, beginning: str, model: str) -> Bar:
        """The one bar of a model (and weight type, as "M/int8") that begins so."""
        model, _, weight_type = model.partition("/")
        (found,) = [
            bar
            for bar in self.bars.all()
            if bar.model == model
            and bar.text.startswith(beginning)
            and bar.text.endswith(weight_type)
        ]
        return found


def test_the_ratio_is_formed_inside_each_round() -> None:
    """The machine halves its speed between the rounds, for both."""
    file = File("W")
    file.decode("W", f"{OURS}/fp32", 99, 49.5, 99)
    file.decode("W", "ctranslate2/fp32", 100, 50, 100)
    file.decode("W", REFERENCE, 60, 30, 60)
    bar = file.bar(f"decode, {OURS}/fp32", "W")
    assert bar.ratio is not None
    assert (bar.ratio.minimum, bar.ratio.maximum) == (0.99, 0.99)
    assert (bar.verdict, bar.asked, bar.note) == (Verdict.PASS, ">= 0.98", "")


@pytest.mark.parametrize(
    ("rate", "verdict"), [(100.0, Verdict.MISS), (101.0, Verdict.PASS), (99.0, Verdict.MISS)]
)
def test_ahead_means_more_than_level(rate: float, verdict: Verdict) -> None:
    file = File("M")
    file.decode("M", f"{OURS}/fp32", rate)
    file.decode("M", "ctranslate2/fp32", 100)
    file.decode("M", REFERENCE, 50)
    bar = file.bar(f"decode, {OURS}/fp32", "M")
    assert (bar.verdict, bar.asked) == (verdict, "> 1")


def test_int8_at_m_is_judged_by_the_better_of_the_two_peers() -> None:
    file = File("M")
    file.decode("M", f"{OURS}/int8", 33)
    file.decode("M", "ctranslate2/int8", 30)
    file.decode("M", "openvino/int8", 35)
    bar = file.bar(f"decode, {OURS}/int8", "M")
    assert bar.ratio is not None
    assert bar.ratio.median == pytest.approx(33 / 35)
    assert (bar.verdict, bar.note) == (Verdict.MISS, "the better one: openvino/int8")


def test_a_peer_that_is_missing_leaves_the_bar_open_unless_the_other_one_misses_it() -> None:
    file = File("M")
    file.decode("M", f"{OURS}/int8", 33)
    file.decode("M", "ctranslate2/int8", 30)
    file.recorded.absent["M/quantised", "openvino/int8"] = "is not set up"
    bar = file.bar(f"decode, {OURS}/int8", "M")
    assert (bar.note, bar.verdict) == ("openvino/int8: is not set up", Verdict.NOT_MEASURED)
    assert bar.ratio is not None
    file.decode("M", f"{OURS}/int8", 29)
    assert file.bar(f"decode, {OURS}/int8", "M").verdict is Verdict.MISS


def test_no_speed_is_judged_while_tokens_differ_from_the_reference() -> None:
    file = File("S")
    file.decode("S", f"{OURS}/fp32", 1000, 1000)
    file.decode("S", "ctranslate2/fp32", 100, 100)
    file.decode("S", REFERENCE, 100, 100, tokens=[1, 9])
    for bar in file.bars.all():
        if bar.text.startswith(f"decode, {OURS}/fp32"):
            assert (bar.verdict, bar.ratio) == (Verdict.PARITY_RED, None)
            assert "2 rounds differ" in bar.note


def test_streams_and_prefixes_are_not_judged_while_tokens_differ_either() -> None:
    file = File("M")
    file.decode("M", f"{OURS}/fp32", 10)
    pair = {"one_tokens_per_s": 10.0, "many_tokens_per_s": 31.0}
    file.put("M", CellKind.STREAMS, f"{OURS}/fp32", pair)
    file.put("M", CellKind.STREAMS, f"{OURS}/int8", pair)
    assert file.bar(f"eight streams : one, {OURS}/fp32", "M").note == "parity not checked"
    file.decode("M", REFERENCE, 5, tokens=[1, 9])
    bar = file.bar(f"eight streams : one, {OURS}/fp32", "M")
    assert (bar.verdict, bar.note) == (
        Verdict.PARITY_RED,
        "1 rounds differ from huggingface's tokens",
    )
    assert file.bar(f"eight streams : one, {OURS}/int8", "M").verdict is Verdict.PASS


def test_what_a_late_prompt_and_a_promise_cost_is_shown() -> None:
    file = File("M")
    times = {"quiet_itl_ms": 20.0, "itl_ms": 150.0, "longest_itl_ms": 160.0}
    chunks = {**times, "late_ttft_ms": 4000.0, "streams": 4}
    file.put("M", CellKind.CHUNKS, f"{OURS}/int8", chunks)
    bar = file.bar("TTFT of a prompt of 2000 : longest ITL of streams beside it", "M/int8")
    assert bar.ratio is not None
    assert (bar.ratio.median, bar.verdict) == (25.0, Verdict.SHOWN)
    assert bar.note == "ITL 20 ms before it, 150 ms beside it"
    plain = {"one_tokens_per_s": 10.0, "many_tokens_per_s": 40.0}
    kept = {"one_tokens_per_s": 10.0, "many_tokens_per_s": 10.0}
    file.put("M", CellKind.COST, f"{OURS}+torch/fp32", plain)
    file.put("M", CellKind.COST, f"{OURS}+torch+deterministic/fp32", kept)
    bar = file.bar(f"eight streams, {OURS}+torch+deterministic/fp32", "M")
    assert bar.ratio is not None
    assert (bar.ratio.median, bar.verdict) == (0.25, Verdict.SHOWN)


def test_a_speed_whose_parity_could_not_be_looked_at_says_so() -> None:
    file = File("W")
    file.decode("W", f"{OURS}/fp32", 100)
    file.decode("W", "ctranslate2/fp32", 100)
    assert file.bar(f"decode, {OURS}/fp32", "W").note == "parity not checked"


def test_of_times_the_shorter_one_is_ahead() -> None:
    file = File("W")
    file.prefill("W", f"{OURS}/int8", 50, 60)
    file.prefill("W", "ctranslate2/int8", 100, 120)
    bar = file.bar(f"prefill of 1000, {OURS}/int8", "W")
    assert bar.ratio is not None
    assert (bar.ratio.median, bar.verdict, bar.measured) == (2.0, Verdict.PASS, "55 : 110 ms")


def test_memory_must_not_exceed_its_limit_and_counts_the_worst_of_decode_and_prefill() -> None:
    file = File("M")
    file.decode("M", f"{OURS}/int8", 1, peak_memory_bytes=13 * 2**26)
    file.prefill("M", f"{OURS}/int8", 1)
    file.decode("M", "ctranslate2/int8", 1, peak_memory_bytes=10 * 2**26)
    bar = file.bar(f"peak memory, {OURS}/int8", "M")
    assert bar.ratio is not None
    assert (bar.ratio.median, bar.verdict, bar.asked) == (1.3, Verdict.MISS, "<= 1.2")


def test_streams_prefix_and_load_are_ratios_of_one_contestant() -> None:
    file = File("S", "M")
    pair = {"one_tokens_per_s": 10.0, "many_tokens_per_s": 31.0}
    file.put("M", CellKind.STREAMS, f"{OURS}/fp32", pair)
    assert file.bar(f"eight streams : one, {OURS}/fp32", "M").verdict is Verdict.PASS
    file.put("S", CellKind.STREAMS, f"{OURS}/fp32", pair)
    assert file.bar(f"eight streams : one, {OURS}/fp32", "S").verdict is Verdict.SHOWN
    file.put("M", CellKind.PREFIX, f"{OURS}/fp32", {"first_ttft_ms": 40.0, "second_ttft_ms": 10.0})
    prefix = [b for b in file.bars.all() if b.text.startswith("TTFT") and b.ratio is not None]
    assert [(b.model, b.verdict, b.ratio.median) for b in prefix if b.ratio] == [
        ("M", Verdict.MISS, 4.0)
    ]
    busy = {"quiet_tokens_per_s": 100.0, "busy_tokens_per_s": 45.0}
    file.put("S", CellKind.BUSY, "ctranslate2/fp32", busy)
    shown = file.bar("decode under load : quiet, ctranslate2", "S")
    assert shown.ratio is not None
    assert (shown.verdict, shown.ratio.median) == (Verdict.SHOWN, 0.45)


def test_what_is_not_on_file_is_not_measured_with_the_reason() -> None:
    file = File("W")
    file.recorded.absent["W/fp32", f"{OURS}/fp32"] = "unknown backend 'fused'"
    bars = list(file.bars.all())
    assert {bar.model for bar in bars} == {"W"}
    assert {bar.verdict for bar in bars} == {Verdict.NOT_MEASURED}
    assert file.bar(f"decode, {OURS}/fp32", "W").note == (f"{OURS}/fp32: unknown backend 'fused'")


def test_every_bar_of_the_issue_is_in_the_table() -> None:
    asked: dict[str, int] = {}
    for bar in File(*MODELS).bars.all():
        key = f"{bar.text.split(',')[0].split(' of ')[0]} {bar.asked}"
        asked[key] = asked.get(key, 0) + 1
    assert asked == {
        "decode >= 0.98": 1,
        "decode >= 1": 2,
        "decode >= 1.4": 1,
        "decode > 1": 3,
        "decode >= 3": 1,
        "decode -": 1,
        "prefill >= 1": 6,
        "eight streams : one >= 3": 3,
        "eight streams : one -": 3,
        "peak memory <= 1.2": 4,
        "peak memory -": 2,
        "decode under load : quiet -": 3,
        "TTFT first : second with a shared prefix >= 5": 6,
        "TTFT -": 3,
        "eight streams -": 4,
    }


def test_the_share_of_bandwidth_is_bytes_read_a_second_over_what_was_measured() -> None:
    """M in FP32 reads every weight but the embedding table, and the KV cache of its context."""
    file = File("M", "S")
    file.recorded.bandwidths["M"] = [15.0, 20.0]
    file.recorded.bandwidths["S"] = [20.0]
    race = next(race for race in file.races if race.key == "M/fp32")
    decode = cell_of(race, CellKind.DECODE)
    geometry = MODELS["M"].geometry
    read = 4 * (geometry.num_parameters - geometry.embedding_parameters)
    read += 4 * geometry.kv_elements_per_token * (decode.input_tokens + decode.output_tokens // 2)
    share = bandwidth_share(file.bars, race, Entry(OURS, "fp32"), decode, [10.0])
    assert share == pytest.approx(read * 10 / 20e9)
    small = next(race for race in file.races if race.key == "S/fp32")
    assert bandwidth_share(file.bars, small, Entry(OURS, "fp32"), decode, [10.0]) is None


def test_the_tables_hold_each_bar_and_each_contestant_on_screen_and_in_markdown() -> None:
    file = File("W")
    file.decode("W", f"{OURS}/fp32", 99)
    file.decode("W", "ctranslate2/fp32", 100)
    file.decode("W", REFERENCE, 60)
    file.recorded.bandwidths["W"] = [20.0, 22.0]
    file.recorded.absent["W/quantised", "openvino/int8"] = "is not set up"
    document = make_document(file.bars)
    stream = io.StringIO()
    print_document(document, Console(file=stream))
    for text in (render(document).replace("\\", ""), stream.getvalue()):
        assert "2 of 9 bars hold." in text
        assert "0.99" in text
        assert "openvino/int8 did not start: is not set up" in text
        assert "at best 22.0 GB/s, the worst of 2 measurements 20.0" in text
        for entry in (f"{OURS}/fp32", f"{SERVER}/int4", "ctranslate2/int8"):
            assert entry in text
