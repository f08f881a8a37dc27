"""Reads and writes rows of CSV, TSV and JSON lines; a bad row is a row with an error."""

from __future__ import annotations

import csv
import difflib
import enum
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

# A cell may hold a long text; csv's own limit is 128 KiB.
_MAX_CELL_CHARS = 16 * 1024 * 1024
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# A spreadsheet takes a cell that begins with one of these for a formula, in any width:
# https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA_STARTS = frozenset("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
# A spreadsheet that splits at another character than we wrote takes what follows it for a cell's
# start. Not ";-)": a formula goes on with a name, a number, a text or a bracket.
_INNER_FORMULA = re.compile(r"((?:[;|]|(?<!^)\t)[ \r\n]*)(?=[=+@\-][ =+@\-]*[\w\"'(])")
_SURROGATE = re.compile("[\ud800-\udfff]")
# A JSON line that is nested deeper is refused: what is read must be written and read again, with
# the row around it, and Python's json module recurses.
_MAX_JSON_DEPTH = 100
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?%?")


class TableError(ValueError):
    """The file as a whole cannot be read; the message names it and what is wrong."""


class TableFormat(enum.StrEnum):
    """How rows stand in a file."""

    CSV = "csv"
    TSV = "tsv"
    JSONL = "jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `line` is where it begins, from 1; a row with an `error` may have fewer values."""

    line: int
    values: dict[str, Any]
    text: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The columns of a file and its rows, which are read as they are asked for.

    Of JSON lines `columns` are the keys of the first object; later ones may have others.
    """

    columns: tuple[str, ...]
    rows: Iterator[Row]


def format_of(name: str) -> TableFormat:
    """By the end of a file's name. Raises TableError."""
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise TableError(f"{name}: its name must end in {', '.join(_SUFFIXES)}")
    return TableFormat(_SUFFIXES[suffix])


def read_table(file: BinaryIO, column: str, table_format: TableFormat, name: str) -> Table:
    """The rows of an open file, the text of each from `column`. `name` is for messages.

    Raises TableError for what is wrong with the file as a whole: empty, UTF-16, no such column.
    What is wrong with a row is the row's `error`.
    """
    start = file.read(2)
    file.seek(0)
    if start in _UTF16_MARKS:
        raise TableError(f"{name}: is in UTF-16; save it as UTF-8 (Excel: 'CSV UTF-8')")
    # Bytes that are not UTF-8 become lone surrogates, which a row is then found by.
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    if table_format is TableFormat.JSONL:
        return _read_json_lines(lines, column, name)
    return _read_separated(lines, column, table_format, name)


def _read_separated(lines: TextIO, column: str, table_format: TableFormat, name: str) -> Table:
    csv.field_size_limit(_MAX_CELL_CHARS)
    header_line = lines.readline()
    # Excel writes semicolons where the comma is the decimal sign.
    comma = ";" if ";" in header_line and "," not in header_line else ","
    delimiter = "\t" if table_format is TableFormat.TSV else comma
    lines.seek(0)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise TableError(f"{name}: line 1: not a header: {error}") from None
    columns = tuple(header)
    if not columns:
        raise TableError(f"{name}: has no header line")
    for number, cell in enumerate(columns, start=1):
        if not _is_utf8(cell):
            raise TableError(
                f"{name}: line 1: the name of column {number}, {_shown(cell)!r}, is not UTF-8; "
                f"save the file as UTF-8"
            )
    twice = next((cell for cell in columns if columns.count(cell) > 1), None)
    if twice is not None:
        raise TableError(f"{name}: line 1: two columns are named {twice!r}")
    _check_column(column, columns, name)
    return Table(columns, _separated_rows(reader, column, columns))


def _separated_rows(reader: Any, column: str, columns: Sequence[str]) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            words = str(error)
            if words == "unexpected end of data":
                words = "a quotation mark is opened and not closed before the file's end"
            yield Row(line, {}, error=words)
            continue
        if not cells:
            continue  # an empty line
        values = dict(zip(columns, map(_shown, cells), strict=False))
        if len(cells) != len(columns):
            yield Row(line, values, error=f"has {len(cells)} cells, the header {len(columns)}")
        else:
            yield _row(line, values, dict(zip(columns, cells, strict=True)), column)


def _read_json_lines(lines: TextIO, column: str, name: str) -> Table:
    rows = _json_rows(lines, column)
    first = next(rows, None)
    if first is None:
        raise TableError(f"{name}: is empty")
    if first.values:
        _check_column(column, tuple(first.values), name)

    def all_rows() -> Iterator[Row]:
        yield first
        yield from rows

    return Table(tuple(first.values), all_rows())


def _json_rows(lines: TextIO, column: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(_shown(line))
            raw = value if _is_utf8(line) else json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, error=f"is not JSON: {error}")
            continue
        if not isinstance(value, dict):
            yield Row(number, {}, error="is not a JSON object")
        elif not _is_shallow(value):
            yield Row(number, {}, error=f"is nested deeper than {_MAX_JSON_DEPTH} levels")
        elif raw is not value and not any(map(_is_not_utf8, raw.values())):
            yield Row(number, value, error="is not UTF-8")  # a key, or within a value
        elif not isinstance(value.get(column), str):
            yield Row(number, value, error=f"{column}: is not text")
        else:
            yield _row(number, value, raw, column)


def _row(line: int, values: dict[str, Any], raw: Mapping[str, Any], column: str) -> Row:
    """The row of `values`; `raw` are the same before U+FFFD took the place of what is no UTF-8."""
    wrong = next((name for name, value in raw.items() if _is_not_utf8(value)), None)
    if wrong is not None:
        return Row(line, values, error=f"{wrong}: is not UTF-8")
    if not raw[column].strip():
        return Row(line, values, error="the text is empty")
    return Row(line, values, raw[column])


def _is_shallow(value: Any) -> bool:
    """Whether lists and objects stand at most _MAX_JSON_DEPTH deep in each other."""
    level = [value]
    for _ in range(_MAX_JSON_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return not any(isinstance(inner, (dict, list)) for inner in level)


def _is_not_utf8(value: Any) -> bool:
    return isinstance(value, str) and not _is_utf8(value)


def _is_utf8(text: str) -> bool:
    return _SURROGATE.search(text) is None


def _shown(text: str) -> str:
    """`text` with U+FFFD for what is not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def _check_column(column: str, columns: Sequence[str], name: str) -> None:
    if column in columns:
        return
    folded = {known.casefold().strip(): known for known in columns}
    near = difflib.get_close_matches(column.casefold(), folded, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]!r}?" if near else "it has"
    listed = "" if near else f" {', '.join(map(repr, columns[:20]))}"
    raise TableError(f"{name}: has no column {column!r}; {hint}{listed}")


class TableWriter:
    """Writes rows with these columns to an open text file (`newline=""`)."""

    def __init__(
        self,
        file: TextIO,
        table_format: TableFormat,
        columns: Sequence[str],
        *,
        excel_safe: bool = False,
    ) -> None:
        self._file = file
        self._columns = tuple(columns)
        self._excel_safe = excel_safe
        self._csv: Any = None
        if table_format is not TableFormat.JSONL:
            delimiter = "\t" if table_format is TableFormat.TSV else ","
            self._csv = csv.writer(file, delimiter=delimiter, lineterminator="\n")
            self._csv.writerow(self._cells({name: name for name in self._columns}))

    def write(self, values: Mapping[str, Any]) -> None:
        """One row; a column without a value is an empty cell, and absent from a JSON line."""
        if self._csv is None:
            self._file.write(json.dumps(dict(values), ensure_ascii=False) + "\n")
        else:
            self._csv.writerow(self._cells(values))

    def _cells(self, values: Mapping[str, Any]) -> list[str]:
        cells = [_cell(values.get(name)) for name in self._columns]
        return [spreadsheet_safe(cell) for cell in cells] if self._excel_safe else cells


def spreadsheet_safe(cell: str) -> str:
    """The cell as a spreadsheet shows it but does not calculate it: with ' before it if need be.

    So too after a ; | or tab within it, where another separator may be looked for.
    """
    cell = _INNER_FORMULA.sub(r"\1'", cell)
    start = cell.lstrip(" \n")[:1]
    is_formula = start in _FORMULA_STARTS and start != "" and not _NUMBER.fullmatch(cell.strip())
    return f"'{cell}" if is_formula else cell


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False)
