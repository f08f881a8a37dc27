"""Files: each row exactly once and in order, whatever cuts a run off."""

from __future__ import annotations

import csv
import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from gptjet.service.apps.sentiment.batch import (
    BatchError,
    BatchSpec,
    classify_file,
    count_rows,
    journal_path,
)
from gptjet.service.apps.sentiment.classify import ClassifierOptions, SentimentClassifier
from gptjet.service.apps.sentiment.pipeline import ServerGoneError
from gptjet.service.apps.sentiment.template import load_template
from gptjet.service.client import (
    InternalError,
    ModelInfo,
    PolicyBlockedError,
    ResourceExhaustedError,
)

from .conftest import FakeClient, unavailable

WORDS = ("good", "bad", "plain", "wonderful", "awful")


def classifier_of(client: FakeClient) -> SentimentClassifier:
    return SentimentClassifier(client, load_template("embedded"))  # type: ignore[arg-type]


@pytest.fixture
def spec(tmp_path: Path) -> BatchSpec:
    """Fifty rows: `n` counts them, `text` is one of WORDS in turn."""
    source = tmp_path / "reviews.csv"
    with source.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "text"])
        writer.writerows([n, f"row {n} is {WORDS[n % 5]}"] for n in range(50))
    return BatchSpec(source=source, column="text", out=tmp_path / "out.csv", concurrency=4)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


async def run_to(client: FakeClient, spec: BatchSpec, stop_after: int) -> None:
    """A run whose server goes away after so many rows."""
    score = client.score
    done = 0

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done > stop_after:
            raise unavailable()
        return await score(*arguments, **options)

    client.score = counted  # type: ignore[method-assign]
    with pytest.raises(ServerGoneError):
        await classify_file(classifier_of(client), spec)
    client.score = score  # type: ignore[method-assign]


def check(spec: BatchSpec, rows: int = 50) -> None:
    """Every row once, in order, with its own label."""
    found = rows_of(spec.out)
    assert [row["n"] for row in found] == [str(n) for n in range(rows)]
    labels = ("positive", "negative", "neutral", "positive", "negative")
    assert [row["label"] for row in found] == [labels[n % 5] for n in range(rows)]
    assert not journal_path(spec.out).exists()
    assert list(spec.out.parent.glob("*.tmp")) == []


async def test_the_output_has_the_input_and_our_columns(
    client: FakeClient, spec: BatchSpec
) -> None:
    progress: list[int] = []
    summary = await classify_file(classifier_of(client), spec, progress.append)
    check(spec)
    first = rows_of(spec.out)[0]
    assert list(first) == [
        *("n", "text", "label", "p_negative", "p_neutral", "p_positive"),
        *("explanation", "uncertain_reason", "num_parts", "error"),
    ]
    assert first["text"] == "row 0 is good"
    assert first["explanation"] == "the word good sounds positive."
    assert sum(float(first[f"p_{name}"]) for name in ("negative", "neutral", "positive")) == (
        pytest.approx(1, abs=1e-5)
    )
    assert progress == list(range(51))
    assert (summary.rows, summary.resumed, summary.errors) == (50, 0, [])
    assert summary.labels == {"positive": 20, "negative": 20, "neutral": 10}


@pytest.mark.parametrize("stop_after", [0, 1, 17, 49])
async def test_a_run_that_lost_its_server_goes_on_where_it_stopped(
    client: FakeClient, spec: BatchSpec, stop_after: int
) -> None:
    await run_to(client, spec, stop_after)
    assert not spec.out.exists()
    client.prompts.clear()
    summary = await classify_file(classifier_of(client), spec)
    check(spec)
    assert summary.resumed <= stop_after
    assert summary.resumed + len(client.prompts) == 50  # nothing that is kept is made again
    if stop_after > 16:
        assert summary.resumed > 0


async def test_half_a_line_at_the_journals_end_is_cut_off(
    client: FakeClient, spec: BatchSpec
) -> None:
    """Wherever in the last two lines a kill cut the file off."""
    await run_to(client, spec, 20)
    journal = journal_path(spec.out)
    whole = journal.read_bytes()
    last_lines = len(b"".join(whole.splitlines(keepends=True)[-2:]))
    for cut in range(0, last_lines, 7):
        spec.out.unlink(missing_ok=True)
        journal.write_bytes(whole[: len(whole) - cut])
        await classify_file(classifier_of(client), spec)
        check(spec)


async def test_a_journal_cut_off_in_its_heading_begins_anew(
    client: FakeClient, spec: BatchSpec
) -> None:
    await run_to(client, spec, 20)
    journal = journal_path(spec.out)
    journal.write_bytes(journal.read_bytes()[:10])
    assert (await classify_file(classifier_of(client), spec)).resumed == 0
    check(spec)


async def test_a_bad_row_keeps_its_place_and_says_its_line(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.source.write_bytes(b'n,text\n0,good\n1\n2,"  "\n3,caf\xe9\n4,"two\nlines, bad"\n5,a,b\n')
    summary = await classify_file(classifier_of(client), spec)
    found = rows_of(spec.out)
    assert [row["n"] for row in found] == ["0", "1", "2", "3", "4", "5"]
    assert [row["error"] for row in found] == [
        "",
        "line 3: has 1 cells, the header 2",
        "line 4: the text is empty",
        "line 5: text: is not UTF-8",
        "",
        "line 8: has 3 cells, the header 2",
    ]
    assert [row["label"] for row in found] == ["positive", "", "", "", "negative", ""]
    assert [line for line, _ in summary.errors] == [3, 4, 5, 8]


async def test_a_row_that_the_server_refuses_is_a_bad_row(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.source.write_text(f"n,text\n0,good\n1,{'x' * 40}\n", encoding="utf-8")
    classifier = SentimentClassifier(
        client,  # type: ignore[arg-type]
        load_template("embedded"),
        options=ClassifierOptions(max_chars=30),
    )
    await classify_file(classifier, spec)
    assert [row["error"] for row in rows_of(spec.out)] == [
        "",
        "line 3: text: must be at most 30 characters, got 40",
    ]


async def test_a_row_that_a_policy_or_a_limit_of_the_server_stops_is_a_bad_row(
    client: FakeClient, spec: BatchSpec
) -> None:
    blocked = PolicyBlockedError(grpc.StatusCode.PERMISSION_DENIED, "text: blocked by rule 'x'")
    too_large = ResourceExhaustedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large")
    client.errors = [blocked, too_large, too_large]  # what may pass is tried twice
    summary = await classify_file(classifier_of(client), replace(spec, concurrency=1))
    assert [line for line, _ in summary.errors] == [2, 3]
    assert "rule 'x'" in summary.errors[0][1]
    assert "message too large" in summary.errors[1][1]
    assert summary.rows == 50


async def test_a_journal_of_another_run_is_not_continued(
    client: FakeClient, spec: BatchSpec
) -> None:
    await run_to(client, spec, 20)
    with spec.source.open("a", encoding="utf-8") as file:
        file.write("50,good\n")
    with pytest.raises(BatchError, match="was begun with another input; delete it"):
        await classify_file(classifier_of(client), spec)
    with pytest.raises(BatchError, match="another input and seed"):
        await classify_file(classifier_of(client), replace(spec, seed=1))
    other = SentimentClassifier(
        client,  # type: ignore[arg-type]
        replace(load_template("embedded"), uncertain_margin=0.2),
        options=ClassifierOptions(explain=False),
    )
    with pytest.raises(BatchError, match="another input and template and explain"):
        await classify_file(other, spec)


async def test_an_output_that_exists_is_only_replaced_on_request(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.out.write_text("precious", encoding="utf-8")
    with pytest.raises(BatchError, match="exists already; --overwrite replaces it"):
        await classify_file(classifier_of(client), spec)
    assert spec.out.read_text(encoding="utf-8") == "precious"
    assert not journal_path(spec.out).exists()
    await classify_file(classifier_of(client), replace(spec, overwrite=True))
    check(spec)


async def test_two_runs_do_not_write_the_same_journal(client: FakeClient, spec: BatchSpec) -> None:
    with journal_path(spec.out).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BatchError, match="another process is writing"):
            await classify_file(classifier_of(client), spec)


async def test_columns_that_the_input_has_already_are_not_overwritten(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.source.write_text("label,text\nmine,good\n", encoding="utf-8")
    await classify_file(classifier_of(client), spec)
    (row,) = rows_of(spec.out)
    assert (row["label"], row["sentiment_label"]) == ("mine", "positive")


async def test_no_column_is_lost_whatever_prefix_the_input_uses(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.source.write_text("text,label,sentiment_label\ngood,a,b\n", encoding="utf-8")
    await classify_file(classifier_of(client), spec)
    (row,) = rows_of(spec.out)
    assert (row["label"], row["sentiment_label"]) == ("a", "b")
    assert row["sentiment_sentiment_label"] == "positive"


def internal() -> InternalError:
    return InternalError(grpc.StatusCode.INTERNAL, "the GPU fell off the bus")


async def test_a_server_that_fails_at_row_after_row_ends_the_run_and_not_the_rows(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec = replace(spec, concurrency=1)
    score = client.score
    asked = 0

    async def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked > 10:
            raise internal()
        return await score(*arguments, **options)

    client.score = failing  # type: ignore[method-assign]
    with pytest.raises(ServerGoneError, match=r"the server fails: 5 rows .* line 16: .*the GPU"):
        await classify_file(classifier_of(client), spec)
    assert not spec.out.exists()
    client.score = score  # type: ignore[method-assign]
    summary = await classify_file(classifier_of(client), spec)
    assert (summary.resumed, summary.errors) == (10, [])
    check(spec)


async def test_a_few_rows_that_the_server_fails_at_keep_their_error(
    client: FakeClient, spec: BatchSpec
) -> None:
    client.errors = [internal() for _ in range(2 * 4)]  # each row is tried twice
    summary = await classify_file(classifier_of(client), replace(spec, concurrency=1))
    assert [line for line, _ in summary.errors] == [2, 3, 4, 5]
    assert summary.rows == 50


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 half a download", b"[1]\n", b'{"journal" of mine\n', b"{}\n"]
)
async def test_a_file_of_the_journals_name_that_is_none_is_left_alone(
    client: FakeClient, spec: BatchSpec, content: bytes
) -> None:
    journal_path(spec.out).write_bytes(content)
    with pytest.raises(BatchError, match=r"out\.csv\.part is no journal .* move it away"):
        await classify_file(classifier_of(client), spec)
    assert journal_path(spec.out).read_bytes() == content


@pytest.mark.parametrize("changed", ["dtype", "backend"])
async def test_rows_of_another_number_type_or_backend_are_not_mixed(
    client: FakeClient, spec: BatchSpec, changed: str
) -> None:
    await run_to(client, spec, 20)
    get_model = client.get_model

    async def other(**options: Any) -> ModelInfo:
        return replace(await get_model(**options), **{changed: "another"})  # type: ignore[arg-type]

    client.get_model = other  # type: ignore[method-assign]
    with pytest.raises(BatchError, match=f"was begun with another {changed};"):
        await classify_file(classifier_of(client), spec)


async def test_json_lines_in_and_out(client: FakeClient, spec: BatchSpec, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "good", "tags": [1]}\n{"text": "\\ud800"}\n', encoding="utf-8")
    await classify_file(classifier_of(client), replace(spec, source=source, out=out))
    first, second = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (first["tags"], first["label"], first["error"]) == ([1], "positive", None)
    assert first["p_positive"] > 0.5
    assert (second["label"], second["error"]) == (None, "line 2: text: is not UTF-8")


async def test_every_key_of_json_lines_is_a_column(
    client: FakeClient, spec: BatchSpec, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"error": "mine", "text": "bad"}\n', encoding="utf-8")
    await classify_file(classifier_of(client), replace(spec, source=source))
    first, second = rows_of(spec.out)
    assert (first["error"], second["error"], second["sentiment_error"]) == ("", "mine", "")
    assert (first["sentiment_label"], second["sentiment_label"]) == ("positive", "negative")


async def test_what_the_model_writes_is_no_formula(client: FakeClient, spec: BatchSpec) -> None:
    spec.source.write_text("n,text\n0,=good\n", encoding="utf-8")
    client.answer = lambda _: ' positive\nExplanation: =HYPERLINK("x")'
    await classify_file(classifier_of(client), spec)
    (row,) = rows_of(spec.out)
    assert (row["text"], row["explanation"]) == ("=good", '\'=HYPERLINK("x")')
    safe = replace(spec, excel_safe=True, overwrite=True)
    await classify_file(classifier_of(client), safe)
    assert rows_of(spec.out)[0]["text"] == "'=good"


async def test_killed_between_the_rename_and_the_end_it_is_finished_without_the_server(
    client: FakeClient, spec: BatchSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(_: Path, missing_ok: bool = False) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr(Path, "unlink", die)
    with pytest.raises(SystemExit):
        await classify_file(classifier_of(client), spec)
    monkeypatch.undo()
    assert spec.out.exists()
    assert journal_path(spec.out).exists()
    client.prompts.clear()
    assert (await classify_file(classifier_of(client), spec)).resumed == 50
    assert client.prompts == []
    check(spec)


async def test_a_file_without_rows_gives_one_without_rows(
    client: FakeClient, spec: BatchSpec
) -> None:
    spec.source.write_text("n,text\n", encoding="utf-8")
    assert (await classify_file(classifier_of(client), spec)).rows == 0
    assert rows_of(spec.out) == []
    assert spec.out.read_text(encoding="utf-8").startswith("n,text,label,")


async def test_rows_are_counted_as_they_are_read(spec: BatchSpec) -> None:
    assert count_rows(spec.source, "text") == 50
