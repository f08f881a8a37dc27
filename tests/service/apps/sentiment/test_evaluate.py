"""The evaluation on the model that counts words, and its plot."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import grpc
import pytest

from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.evaluate import (
    EvaluationError,
    LabelledRow,
    evaluate,
    load_rows,
    sample_rows,
)
from gptjet.service.apps.sentiment.pipeline import ServerGoneError
from gptjet.service.apps.sentiment.plot import PlotError, check_plot, draw_evaluation
from gptjet.service.apps.sentiment.table import TableError
from gptjet.service.apps.sentiment.template import load_template
from gptjet.service.apps.sentiment.vader import VaderMissingError, vader_decisions
from gptjet.service.client import InternalError

from .conftest import FakeClient

TEMPLATE = load_template("embedded")
ROWS = [
    LabelledRow("good", "positive"),
    LabelledRow("wonderful", "positive"),
    LabelledRow("awful", "negative"),
    LabelledRow("so so", "neutral"),
    LabelledRow("bad", "neutral"),  # decided negative
    LabelledRow("good, bad", "negative"),  # nearly as probable
    LabelledRow("", "neutral"),  # an error
]


async def report_of(client: FakeClient, **options: Any) -> dict[str, Any]:
    classifier = SentimentClassifier(client, TEMPLATE)  # type: ignore[arg-type]
    return await evaluate(classifier, ROWS, **options)


async def test_every_figure_is_of_the_rows_it_says(client: FakeClient) -> None:
    report = await report_of(client)
    assert (report["rows"], report["errors"]) == (7, 1)
    assert report["first_error"] == "text: must not be empty or blank"
    # Rows: true; columns: decided as negative, neutral, positive.
    assert report["figures"]["rows"] == 6
    negative, neutral, positive = report["figures"]["confusion"]
    assert sum(negative) == 2
    assert neutral == [1, 1, 0]
    assert positive == [0, 0, 2]
    # Without the row that is uncertain: 4 of 5 right.
    assert report["abstaining"]["coverage"] == pytest.approx(5 / 6)
    assert report["abstaining"]["figures"]["accuracy"] == pytest.approx(4 / 5)
    assert report["explanations"]["given"] == 1.0
    assert report["explanations"]["name_missing_words"] == 0.0
    assert report["options"]["template"] == "embedded"
    assert report["model"]["name"] == "words"
    assert report["vader"] is None


async def test_vader_decides_the_same_rows(client: FakeClient) -> None:
    asked: list[str] = []

    def decide(texts: Any) -> list[str]:
        asked.extend(texts)
        return ["neutral"] * len(texts)

    report = await report_of(client, decide=decide)
    assert asked == [row.text for row in ROWS if row.text]
    assert report["vader"]["figures"]["rows"] == report["figures"]["rows"] == 6
    gain = report["vader"]["macro_f1_advantage"]
    assert gain["difference"] == pytest.approx(
        report["figures"]["macro_f1"] - report["vader"]["figures"]["macro_f1"]
    )


def test_vader_decides_by_its_published_thresholds() -> None:
    texts = ["The food was wonderful!", "The food was horrible.", "The shop opens at nine."]
    assert vader_decisions(texts) == ["positive", "negative", "neutral"]


def test_without_vader_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(VaderMissingError, match="pip install 'gptjet"):
        vader_decisions([])


async def test_what_cannot_be_measured_is_refused(client: FakeClient) -> None:
    classifier = SentimentClassifier(client, TEMPLATE)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="no rows"):
        await evaluate(classifier, [])
    with pytest.raises(EvaluationError, match="has no label angry"):
        await evaluate(classifier, [LabelledRow("a", "angry")])
    with pytest.raises(EvaluationError, match="every row has an error; the first: text: must not"):
        await evaluate(classifier, [LabelledRow(" ", "neutral")])


async def test_a_server_that_fails_at_row_after_row_ends_the_evaluation(
    client: FakeClient,
) -> None:
    classifier = SentimentClassifier(client, TEMPLATE)  # type: ignore[arg-type]
    client.errors = [InternalError(grpc.StatusCode.INTERNAL, "id 5") for _ in range(200)]
    with pytest.raises(ServerGoneError, match=r"5 rows one after the other, .*'row 4': .*id 5"):
        await evaluate(
            classifier, [LabelledRow(f"row {n}", "neutral") for n in range(100)], concurrency=1
        )
    assert len(client.errors) > 100


def test_rows_of_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\na\tPositive\nb\tneutral \n", encoding="utf-8")
    assert load_rows(path, "text", "label", TEMPLATE) == [
        LabelledRow("a", "positive"),
        LabelledRow("b", "neutral"),
    ]
    with pytest.raises(TableError, match="has no column 'stars'; it has text, label"):
        load_rows(path, "text", "stars", TEMPLATE)
    path.write_text("text\tlabel\na\tgreat\n", encoding="utf-8")
    with pytest.raises(TableError, match="line 2: label: must be one of negative, neutral, pos"):
        load_rows(path, "text", "label", TEMPLATE)


def test_a_sample_is_drawn_by_its_seed_and_keeps_the_order() -> None:
    rows = [LabelledRow(str(n), "neutral") for n in range(100)]
    drawn = sample_rows(rows, 10, 3)
    assert drawn == sample_rows(rows, 10, 3) != sample_rows(rows, 10, 4)
    assert [int(row.text) for row in drawn] == sorted(int(row.text) for row in drawn)
    assert sample_rows(rows, None, 3) == sample_rows(rows, 1000, 3) == rows


async def test_the_plot_has_the_figures_in_words(client: FakeClient, tmp_path: Path) -> None:
    report = await report_of(client, decide=lambda texts: ["neutral"] * len(texts))
    path = tmp_path / "plot.svg"
    draw_evaluation(report, path)
    once = path.read_bytes()
    draw_evaluation(report, path)
    assert path.read_bytes() == once  # the same figures, the same file
    ElementTree.fromstring(once)
    draw_evaluation(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "plot.svg"]


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(PlotError, match=r"must end in \.png or \.svg"):
        check_plot(Path("plot.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match="pip install"):
        check_plot(Path("plot.png"))
