"""Reads CSV files as people have them: any of the usual separators and encodings, with a header or
without, and guesses which column has the texts."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from gptjet.service.apps.sentiment.web.errors import PageError

_DELIMITERS = ",;\t|"
# Stands in no text: a file of one text a line, commas and all, is one column.
_NONE = "\x1f"
_SAMPLE_CHARS = 16_384
_TEXT_NAMES = (
    "text",
    "review",
    "comment",
    "sentence",
    "message",
    "content",
    "body",
    "tweet",
    "feedback",
    "description",
)
_MAX_HEADER_CHARS = 60
_MAX_COLUMNS = 200


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `line` is where it begins in the file, counted from 1."""

    line: int
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A CSV file. `columns` are the header's names, or "column 1" and so on without one.

    column     index of the column that seems to have the texts
    encoding   what the bytes were read as
    delimiter  what separates the cells; "" where there is one column
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    has_header: bool
    column: int
    encoding: str
    delimiter: str


def read_table(content: bytes, *, has_header: bool | None, max_rows: int) -> Table:
    """The table in a CSV file; `has_header` None: guess. Raises PageError 400 or 413."""
    text, encoding = _decode(content)
    delimiter = _delimiter(text[:_SAMPLE_CHARS])
    rows = _rows(text, delimiter, max_rows)
    if not rows:
        raise PageError(400, "empty", "the file has no rows")
    header = _looks_like_header(rows) if has_header is None else has_header
    first, *rest = rows
    width = max(len(row.cells) for row in rows)
    if width > _MAX_COLUMNS:
        raise PageError(
            413, "too_long", f"the file has {width} columns; the limit is {_MAX_COLUMNS}"
        )
    names = [cell.strip() for cell in first.cells] if header else []
    columns = tuple(
        names[i] if i < len(names) and names[i] else f"column {i + 1}" for i in range(width)
    )
    kept = rest if header else rows
    if not kept:
        raise PageError(400, "empty", "the file has a header and no rows")
    if len(kept) > max_rows:
        raise _too_many(max_rows)
    column = _text_column(columns, kept)
    return Table(columns, tuple(kept), header, column, encoding, delimiter.strip(_NONE))


def _decode(content: bytes) -> tuple[str, str]:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, {"utf-8-sig": "UTF-8", "utf-16": "UTF-16"}.get(encoding, "Windows-1252")
    raise PageError(400, "not_text", "the file is not text; save the table as CSV in UTF-8")


def _delimiter(sample: str) -> str:
    """The separator that cuts the first lines into the same number of cells, and into the most."""

    def score(delimiter: str) -> tuple[int, int]:
        widths = []
        try:
            for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter):
                if cells:
                    widths.append(len(cells))
        except csv.Error:
            return (0, 0)
        widths = widths[:-1] or widths  # the sample may cut the last one
        most = max(set(widths), key=widths.count, default=1)
        # A text has commas of its own: how many rows agree tells the separator from those.
        return (widths.count(most) if most > 1 else 0, most)

    best = max(_DELIMITERS, key=score)
    return best if score(best)[0] else _NONE


def _rows(text: str, delimiter: str, max_rows: int) -> list[Row]:
    # Python's limit of a cell is the whole process's. The file's size is limited already, and a
    # text that is too long is an error of its row.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows: list[Row] = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(line, tuple(cells)))
            line = reader.line_num + 1
            if len(rows) > max_rows + 1:  # one may be a header
                raise _too_many(max_rows)
    except csv.Error as error:
        raise PageError(400, "not_csv", f"line {reader.line_num}: {error}") from None
    return rows


def _too_many(max_rows: int) -> PageError:
    return PageError(413, "too_long", f"the file has more than {max_rows:,} rows, the limit")


def _looks_like_header(rows: Sequence[Row]) -> bool:
    names = [cell.strip() for cell in rows[0].cells]
    if any(name.casefold() in _TEXT_NAMES for name in names):
        return True
    short = all(name and len(name) <= _MAX_HEADER_CHARS for name in names)
    words = not any(_is_number(name) or name.endswith((".", "!", "?")) for name in names)
    return len(names) > 1 and short and words and len(set(names)) == len(names)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


def _text_column(columns: Sequence[str], rows: Sequence[Row]) -> int:
    folded = [name.casefold() for name in columns]
    for name in _TEXT_NAMES:
        if name in folded:
            return folded.index(name)
    sizes = [
        sum(
            len(row.cells[i]) for row in rows if i < len(row.cells) and not _is_number(row.cells[i])
        )
        for i in range(len(columns))
    ]
    return sizes.index(max(sizes))
