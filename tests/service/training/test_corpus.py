"""Parsing, cleaning, labels and splits of the rated texts."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from gptjet.service.embedded import heldout_rows
from gptjet.service.training.corpus import (
    SDIST_NAME,
    SPLITS,
    CorpusError,
    Row,
    clean_text,
    deduplicate,
    fetch_sdist,
    fingerprint,
    label_for,
    load_corpus,
    normalised_key,
    parse_ground_truth,
    parse_lexicon,
    split_rows,
    verify_sdist,
)


def make_row(number: int, text: str, rating: float, document: str = "") -> Row:
    return Row(
        id=f"made-{number}",
        source="made",
        document=document or f"made-{number}",
        text=text,
        mean_rating=rating,
        label=label_for(rating),
    )


def made_rows(count: int = 400) -> list[Row]:
    rng = random.Random(0)
    words = [f"word{index}" for index in range(5000)]
    return [
        make_row(index, " ".join(rng.sample(words, 12)), 0.0, document=f"document-{index // 4}")
        for index in range(count)
    ]


@pytest.mark.parametrize(
    ("rating", "label"),
    [
        (-4.0, "negative"),
        (-0.5, "negative"),
        (-0.49, "neutral"),
        (0.0, "neutral"),
        (0.49, "neutral"),
        (0.5, "positive"),
        (3.9, "positive"),
    ],
)
def test_label_is_neutral_strictly_inside_half_a_point(rating: float, label: str) -> None:
    assert label_for(rating) == label


def test_cleaning_decodes_entities_twice_and_makes_one_plain_line() -> None:
    raw = "  I &amp;lt;3 it\t \u201cso\u201d much &amp; don\u2019t ''stop''\u00a0now "
    assert clean_text(raw) == """I <3 it "so" much & don't "stop" now"""


def test_ground_truth_keeps_tabs_out_and_reads_the_document_from_the_id() -> None:
    data = b"7_12\t-1.25\tfroze twice .\r\n7_13\t0\tit plays dvds."
    first, second = parse_ground_truth("amazon", data)
    assert (first.id, first.document, first.mean_rating) == ("amazon-7_12", "amazon-7", -1.25)
    assert (second.text, second.label) == ("it plays dvds.", "neutral")
    (movie,) = parse_ground_truth("movie", b"7\t2.0\tA gem.")
    assert movie.document == "movie-7"


def test_ground_truth_reads_latin_1_where_utf_8_fails() -> None:
    (row,) = parse_ground_truth("tweet", "1\t1.0\tcaf\u00e9".encode("latin-1"))
    assert row.text == "caf\u00e9"


def test_a_line_without_three_fields_is_an_error_that_names_it() -> None:
    with pytest.raises(CorpusError, match="tweet line 2"):
        parse_ground_truth("tweet", b"1\t1.0\tfine\n2\tbroken")


def test_lexicon_reads_words_and_emoticons() -> None:
    data = b":)\t2.0\t1.1\t[2, 2]\ngood\t1.9\t0.9\t[2, 1]\n"
    assert parse_lexicon(data) == {":)": 2.0, "good": 1.9}


def test_copies_that_differ_in_case_and_punctuation_count_once() -> None:
    rows = [make_row(1, "Die, die!", -2.0), make_row(2, "die DIE", -1.0), make_row(3, ":)", 2.0)]
    rows.append(make_row(4, ":(", -2.0))
    assert [row.id for row in deduplicate(rows)] == ["made-1", "made-3", "made-4"]


def test_splits_cover_all_rows_once_and_keep_documents_together() -> None:
    rows = made_rows()
    split = split_rows(rows)
    assert sorted(row.id for name in SPLITS for row in split[name]) == sorted(r.id for r in rows)
    documents = [{row.document for row in split[name]} for name in SPLITS]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    assert len(split["test"]) == 36  # 9 of 100 documents by hash: the same on every machine
    assert len(split["validation"]) == 12


def test_splits_do_not_depend_on_the_order_of_rows() -> None:
    rows = made_rows()
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    test_ids = {row.id for row in split_rows(rows)["test"]}
    assert {row.id for row in split_rows(shuffled)["test"]} == test_ids


def test_texts_sharing_eight_words_land_in_one_split() -> None:
    rows = made_rows()
    moved = {row.id: name for name in SPLITS for row in split_rows(rows)[name]}
    held_out = next(row for row in rows if moved[row.id] == "test")
    shared = " ".join(held_out.text.split()[:8])
    # "z" sorts after every other id, so the pair keeps the held-out row's cluster name.
    twin = make_row(0, f"{shared} and something else", 0.0, document="z")
    twin = Row("z-1", "made", "z", twin.text, 0.0, "neutral")
    split = split_rows([*rows, twin])
    assert any(row.id == "z-1" for row in split["test"])


def test_an_altered_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / SDIST_NAME).write_bytes(b"not the archive")
    with pytest.raises(CorpusError, match="sha256"):
        verify_sdist(tmp_path / SDIST_NAME)
    with pytest.raises(CorpusError, match="sha256"):
        fetch_sdist(tmp_path)  # present, so nothing is downloaded, but not trusted either


def _cached_sdist() -> Path | None:
    named = os.environ.get("CORPUS_SDIST")
    path = Path(named) if named else Path("build/corpus") / SDIST_NAME
    return path if path.is_file() else None


@pytest.mark.skipif(_cached_sdist() is None, reason="`make corpus` fetches the texts")
def test_no_held_out_text_is_in_training() -> None:
    sdist = _cached_sdist()
    assert sdist is not None
    corpus = load_corpus(sdist)
    held_out = {normalised_key(row.text) for row in corpus.test}
    seen = {normalised_key(row.text) for row in (*corpus.train, *corpus.validation)}
    assert not held_out & seen
    assert {r.document for r in corpus.test}.isdisjoint(r.document for r in corpus.train)
    shipped = [Row(r.id, r.source, "", r.text, r.mean_rating, r.label) for r in heldout_rows()]
    assert fingerprint(shipped) == fingerprint(corpus.test)
