"""Rows in and out: CSV, TSV, JSON lines; bad rows are rows with an error."""

from __future__ import annotations

import csv
import io
import json

import pytest

from gptjet.service.apps.sentiment.table import (
    Row,
    TableError,
    TableFormat,
    TableWriter,
    format_of,
    read_table,
    spreadsheet_safe,
)


def rows_of(content: bytes, table_format: TableFormat = TableFormat.CSV) -> list[Row]:
    return list(read_table(io.BytesIO(content), "text", table_format, "it").rows)


def test_quoted_cells_hold_commas_quotes_and_line_breaks_and_lines_are_counted() -> None:
    content = b'id,text\r\n1,"a, ""b""\r\nc"\r\n\r\n2,d\r\n'
    assert [(row.line, row.text) for row in rows_of(content)] == [(2, 'a, "b"\r\nc'), (5, "d")]


def test_a_byte_order_mark_and_excels_semicolons_are_understood() -> None:
    assert [row.text for row in rows_of(b"\xef\xbb\xbfid;text\n1;a,b\n")] == ["a,b"]


def test_a_bad_row_says_what_is_wrong_and_the_others_are_read() -> None:
    content = b'id,text\n1,good\n2\n3,a,b\n4, \n5,caf\xe9\n6,"a"b\n7,fine\n'
    rows = rows_of(content)
    assert [(row.line, row.error) for row in rows] == [
        (2, None),
        (3, "has 1 cells, the header 2"),
        (4, "has 3 cells, the header 2"),
        (5, "the text is empty"),
        (6, "text: is not UTF-8"),
        (7, "',' expected after '\"'"),
        (8, None),
    ]
    assert rows[4].values == {"id": "5", "text": "caf\ufffd"}


def test_a_quotation_mark_that_is_never_closed_is_named_with_its_line() -> None:
    rows = rows_of(b'id,text\n1,good\n2,"open\n3,x\n')
    assert rows[-1].line == 3
    assert rows[-1].error == "a quotation mark is opened and not closed before the file's end"


@pytest.mark.parametrize(
    ("content", "table_format", "error"),
    [
        (b"text,place\ngood,K\xf6ln\n", TableFormat.CSV, "place: is not UTF-8"),
        (b"text\tplace\ngood\tK\xf6ln\n", TableFormat.TSV, "place: is not UTF-8"),
        (b'{"text": "good", "place": "K\xf6ln"}\n', TableFormat.JSONL, "place: is not UTF-8"),
        (b'{"text": "good", "places": ["K\xf6ln"]}\n', TableFormat.JSONL, "is not UTF-8"),
    ],
)
def test_bytes_that_are_no_utf8_are_found_in_every_column(
    content: bytes, table_format: TableFormat, error: str
) -> None:
    assert [row.error for row in rows_of(content, table_format)] == [error]


def test_a_json_line_that_is_nested_too_deep_is_refused() -> None:
    def line(depth: int) -> bytes:
        return b'{"text": "good", "deep": ' + b"[" * depth + b"]" * depth + b"}\n"

    rows = rows_of(line(99) + line(101) + line(900) + line(5000), TableFormat.JSONL)
    assert [row.error for row in rows[:3]] == [
        None,
        "is nested deeper than 100 levels",
        "is nested deeper than 100 levels",
    ]
    assert rows[3].error is not None


def test_json_lines_keep_their_values_and_bad_ones_are_named() -> None:
    lines = [
        b'{"text": "a", "n": 1}',
        b"{",
        b"[1]",
        b'{"text": 3}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": "b"}',
    ]
    rows = rows_of(b"\n".join(lines), TableFormat.JSONL)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5, 7]
    assert rows[0].values == {"text": "a", "n": 1}
    errors = [row.error for row in rows]
    assert errors[0] is None
    assert errors[1] is not None
    assert errors[1].startswith("is not JSON")
    assert errors[2:] == ["is not a JSON object", "text: is not text", "text: is not UTF-8", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,Text\n1,a\n", "it: has no column 'text'; did you mean 'Text'?"),
        (b"id,txt\n1,a\n", "did you mean 'txt'?"),
        (b"id,body\n1,a\n", "it: has no column 'text'; it has 'id', 'body'"),
        (b"", "it: has no header line"),
        (b"text,text\n", "it: line 1: two columns are named 'text'"),
        (
            b"text,gr\xf6\xdfe\na,1\n",
            "it: line 1: the name of column 2, 'gr\ufffd\ufffde', is not UTF-8",
        ),
        ("text\na".encode("utf-16"), "it: is in UTF-16; save it as UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(TableError) as caught:
        rows_of(content)
    assert message in str(caught.value)


def test_the_format_is_told_by_the_name() -> None:
    assert format_of("A.CSV") is TableFormat.CSV
    assert format_of("a.tab") is TableFormat.TSV
    assert format_of("a.ndjson") is TableFormat.JSONL
    with pytest.raises(TableError, match=r"must end in \.csv"):
        format_of("a.xlsx")


@pytest.mark.parametrize("table_format", list(TableFormat))
def test_what_is_written_is_read_again(table_format: TableFormat) -> None:
    file = io.StringIO(newline="")
    text = 'a,\t"b"\nc\r\n\u00e9;=1'
    writer = TableWriter(file, table_format, ["text", "n"])
    writer.write({"text": text, "n": "5"})
    (row,) = rows_of(file.getvalue().encode(), table_format)
    assert row.values == {"text": text, "n": "5"}


@pytest.mark.parametrize(
    "cell", ["=1+1", "+A1", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", " =1", "\uff1d1"]
)
def test_a_cell_that_a_spreadsheet_would_calculate_is_made_text(cell: str) -> None:
    assert spreadsheet_safe(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["", "good", "-5", "+1.5e3", "-3,14", "a=b", "50%", "'=1"])
def test_other_cells_are_left_as_they_are(cell: str) -> None:
    assert spreadsheet_safe(cell) == cell


def test_a_safe_table_guards_headers_and_cells() -> None:
    file = io.StringIO(newline="")
    TableWriter(file, TableFormat.CSV, ["=x"], excel_safe=True).write({"=x": "=1"})
    assert list(csv.reader(io.StringIO(file.getvalue()))) == [["'=x"], ["'=1"]]


def test_numbers_and_missing_values_are_written_for_people() -> None:
    file = io.StringIO(newline="")
    TableWriter(file, TableFormat.CSV, ["p", "none", "list"]).write({"p": 0.25, "list": [1, "a"]})
    assert list(csv.reader(io.StringIO(file.getvalue())))[1] == ["0.25", "", json.dumps([1, "a"])]


@pytest.mark.parametrize(
    ("cell", "safe"),
    [
        ("a;=1+1", "a;'=1+1"),
        ("a | @SUM(A1)", "a | '@SUM(A1)"),
        ("a\t+cmd|-2", "a\t'+cmd|'-2"),
        ("fine ;-) and ;=", "fine ;-) and ;="),
        ("a; b - c", "a; b - c"),
    ],
)
def test_a_formula_after_another_separator_within_a_cell_is_made_text(cell: str, safe: str) -> None:
    assert spreadsheet_safe(cell) == safe
