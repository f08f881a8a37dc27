"""The committed result files: each is in the list that says what was run."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_every_result_file_is_in_the_list() -> None:
    listed = (RESULTS / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in RESULTS.iterdir() if path.name != "README.md"]
    assert files
    assert [name for name in files if f"| `{name}` |" not in listed] == []
