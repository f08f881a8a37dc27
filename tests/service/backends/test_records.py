"""What a program that reads the lines is told: every record, and why there are no more."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from gptjet.service.backends.records import Record, parse_cells, print_records
from gptjet.service.engine.errors import BackendLoadError


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[Record]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_record_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[Record] = [{"kind": "cell", "ttft_ms": [1.5]}, {"kind": "memory"}]
    assert print_records(lambda: iter(records)) == 0
    assert lines_of(capsys) == records


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (BackendLoadError("no card"), 2, {"message": "no card", "unavailable": True}),
        (ValueError("a\n  b"), 1, {"message": "ValueError: a b", "unavailable": False}),
    ],
)
def test_what_stopped_it_is_the_last_line(
    error: Exception, code: int, line: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    def make() -> Iterator[Record]:
        yield {"kind": "model"}
        raise error

    assert print_records(make) == code
    assert lines_of(capsys) == [{"kind": "model"}, {"kind": "error", **line}]


def test_cells_are_pairs_of_lengths() -> None:
    assert parse_cells("50:200,1000:50") == [(50, 200), (1000, 50)]
