"""The clock check: against a served mock, what it compares, and that a wrong clock is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.load import check_clock
from gptjet.benchmarks.load.check_clock import ClockCheck
from gptjet.benchmarks.results import read_records


def test_both_loops_are_checked_against_a_server_of_known_delays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether 5 % hold is the machine's business; no latency can be below what is slept."""
    out = tmp_path / "clock.jsonl"
    code = check_clock.main(
        ["--prefill-ms", "20", "--decode-ms", "5", "--requests", "3", "--out", str(out)]
    )
    *_, verdict = read_records(out)
    assert verdict["kind"] == "load_clock_check"
    assert [(each["mode"], each["measure"]) for each in verdict["checks"]] == [
        ("closed", "ttft"),
        ("closed", "itl"),
        ("open", "ttft"),
        ("open", "itl"),
    ]
    for each in verdict["checks"]:
        assert each["expected_ms"] == {"ttft": 20, "itl": 5}[each["measure"]]
        # Histograms round to about 1 %.
        assert each["measured_ms"] >= 0.98 * each["expected_ms"]
        assert each["server_ms"] >= 0.98 * each["expected_ms"]
    assert verdict["holds"] == all(each["holds"] for each in verdict["checks"])
    assert code == (0 if verdict["holds"] else 1)
    assert "the server's clock" in capsys.readouterr().out
    requests = [r for r in read_records(out) if r["kind"] == "load_request"]
    assert len(requests) == 2 * 3


@pytest.mark.parametrize(
    ("measured_ms", "holds"), [(104.9, True), (105.1, False), (95.1, True), (94.9, False)]
)
def test_more_than_five_percent_off_does_not_hold(measured_ms: float, holds: bool) -> None:
    check = ClockCheck("closed", "ttft", 100.0, measured_ms, 100.0)
    assert check.holds is holds
    fields: dict[str, Any] = check.to_json()
    assert fields["error"] == pytest.approx(measured_ms / 100 - 1)
