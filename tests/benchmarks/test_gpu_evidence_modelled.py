"""The modelled cards: what is assumed says so, and what is measured is never of these cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.gpu_evidence.modelled import (
    EvidenceError,
    main,
    model_card,
    read_shares,
    render,
)

ROOT = Path(__file__).resolve().parents[2]


def evidence(*kernels: dict[str, Any], device: str = "NVIDIA H100") -> dict[str, Any]:
    bandwidth = {"kind": "bandwidth", "device": device, "copy_gb_s": 3000.0}
    return {"kind": "gpu-evidence", "stages": [{"records": [bandwidth, *kernels]}]}


def kernel(case: str, share: float, **fields: Any) -> dict[str, Any]:
    record = {"kind": "kernel", "kernel": "layer_norm_linear", "case": case, "rows": 1}
    return {**record, "red": False, "share_of_copy": share, **fields}


def test_without_evidence_every_share_is_assumed_and_the_page_says_so() -> None:
    shares = read_shares(None)
    assert all(share.is_assumed for share in shares.passes.values())
    text = render(shares)
    assert "| measured on" not in text
    assert text.count("| assumed |") == 12
    assert "None was measured on these cards" in text


def test_measured_shares_take_the_place_of_assumed_ones() -> None:
    shares = read_shares(
        evidence(
            kernel("w_in float16, rows 1", 0.5),
            kernel("w_in int8, rows 8", 0.1, rows=8),
            kernel("w_out int8, rows 1", 0.1, red=True),
            kernel("lm_head int4, rows 1", 1.2),
            kernel("float16 KV, context 2048", 0.7, kernel="paged_attention"),
            kernel("int8 KV, context 2048", 0.3, kernel="paged_attention"),
        )
    )
    assert shares.passes["w_in", "float16"].value == 0.5
    assert shares.passes["w_in", "float16"].source == "measured on NVIDIA H100"
    assert shares.passes["lm_head", "int4"].value == 1.0  # more than a copy is a cache's
    assert shares.attention.value == 0.7
    assert shares.passes["w_in", "int8"].is_assumed  # eight rows are not batch 1
    assert shares.passes["w_out", "int8"].is_assumed  # red
    assert shares.copy.is_assumed  # of another card's memory
    slow = model_card(75, "float16", shares)
    assert slow.tokens_per_s < model_card(75, "float16", read_shares(None)).tokens_per_s


def test_model_is_bytes_over_bandwidth_and_gaps() -> None:
    """A T4: 11.687 GB of weights and 0.069 GB of KV, at 0.81 of 320 GB/s, and 144 us of gaps."""
    modelled = model_card(75, "float16", read_shares(None))
    assert modelled.ceiling_tokens_per_s == pytest.approx(320 / 11.756, 1e-3)
    assert modelled.tokens_per_s == pytest.approx(1 / (11.756 / (0.81 * 320) + 144e-6), 1e-3)
    assert modelled.goal == 22
    assert modelled.needed_share == pytest.approx(11.756 / (1 / 22 - 144e-6) / 320, 1e-3)
    assert model_card(75, "int4", read_shares(None)).goal is None


@pytest.mark.parametrize(
    "result", [{}, {"kind": "gpu-evidence", "stages": []}, evidence(device="cpu")]
)
def test_evidence_of_no_card_is_refused(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EvidenceError):
        read_shares(result)
    file, page = tmp_path / "r.json", tmp_path / "docs" / "page.md"
    file.write_text(json.dumps(result))
    assert main(["--evidence", str(file), "--output", str(page)]) == 2
    assert not page.exists()
    assert main(["--evidence", str(tmp_path / "none.json"), "--output", str(page)]) == 2


def test_the_page_in_the_repository_is_what_the_command_writes(tmp_path: Path) -> None:
    """Where it was written from a result file, that file is among the results."""
    page = ROOT / "docs" / "modelled-cards.md"
    assert main(["--output", str(tmp_path / "page.md")]) == 0
    written = [(tmp_path / "page.md").read_text()]
    for file in sorted((ROOT / "benchmarks" / "results").glob("gpu-evidence-*.json")):
        try:
            written.append(render(read_shares(json.loads(file.read_text()))))
        except EvidenceError:
            continue
    assert page.read_text() in written
