"""The result file that the README's figures are made from: whole, consistent, better than VADER."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from gptjet.service import embedded

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    (*_, path) = sorted((ROOT / "benchmarks" / "results").glob("*-sentiment-embedded.json"))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """What the training's own evaluation measured on the same rows, without the service."""
    found: dict[str, Any] = json.loads((embedded.embedded_path() / "evaluation.json").read_text())
    return found["figures"]


def test_every_held_out_row_was_measured(result: dict[str, Any]) -> None:
    rows = len(embedded.heldout_rows())
    assert result["sample"] == {
        "data": "embedded held-out rows",
        "limit": None,
        "sample_seed": 0,
    }
    assert result["rows"] == result["figures"]["rows"] == rows
    assert result["vader"]["figures"]["rows"] == rows
    assert result["errors"] == 0
    assert sum(map(sum, result["figures"]["confusion"])) == rows


def test_macro_f1_is_above_vaders_by_more_than_chance(result: dict[str, Any]) -> None:
    ours, vaders = result["figures"]["macro_f1"], result["vader"]["figures"]["macro_f1"]
    gain = result["vader"]["macro_f1_advantage"]
    assert ours > vaders
    assert gain["difference"] == pytest.approx(ours - vaders)
    assert gain["low"] > 0


def test_the_service_decides_as_the_training_measured(
    result: dict[str, Any], trained: dict[str, Any]
) -> None:
    """VADER to the row; the checkpoint but for rows where arithmetic of another order tips it."""
    assert result["vader"]["figures"]["confusion"] == trained["vader"]["confusion"]
    for mine, theirs in zip(
        result["figures"]["confusion"], trained["embedded"]["confusion"], strict=True
    ):
        assert mine == pytest.approx(theirs, abs=3)


def test_leaving_out_what_is_uncertain_helps(result: dict[str, Any]) -> None:
    abstaining = result["abstaining"]
    assert 0 < abstaining["coverage"] < 1
    assert abstaining["figures"]["accuracy"] > result["figures"]["accuracy"]


def test_the_result_names_no_path(result: dict[str, Any]) -> None:
    assert "/" not in json.dumps(result["environment"]["cpu"]["model"])
    assert result["model"]["name"] == embedded.EMBEDDED_NAME
    assert result["environment"]["packages"]["vaderSentiment"]
    assert result["environment"]["git"]["modified"] is False


def test_the_readmes_section_is_made_of_its_figures(result: dict[str, Any]) -> None:
    generator = runpy.run_path(str(ROOT / ".ci" / "readme.py"))
    section = generator["sentiment_figures"](ROOT)
    assert (
        f"| {result['figures']['macro_f1']:.3f} | {result['figures']['accuracy']:.3f} |" in section
    )
    vader = result["vader"]["figures"]
    assert f"| VADER, compound +-0.05 | {vader['macro_f1']:.3f} |" in section
    load = result["environment"]["load_average"][0]
    assert f"in flight, load average {load:.1f} on " in section
    readme = "<!-- generated: sentiment -->\nold\n<!-- end -->"
    assert section in generator["render"](readme, ROOT)
