"""The goals' verdicts, from records with figures that can be calculated by hand."""

from __future__ import annotations

from typing import Any

import pytest

from gptjet.benchmarks.gpu_evidence.bars import (
    Bar,
    bars_table,
    judge_bars,
    prefill_flops,
    weight_pass_bytes,
)
from gptjet.benchmarks.gpu_evidence.tables import batch_table, kernel_table, profile_table
from gptjet.kernels.gpu.compile_case import GPT_J_6B

H100 = "NVIDIA H100"


def model(backend: str, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "model",
        "backend": backend,
        "geometry": "gpt-j-6b",
        "device": "cuda:0",
        **fields,
    }


def cell(backend: str, lengths: tuple[int, int], rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "cell",
        "backend": backend,
        "input_tokens": lengths[0],
        "output_tokens": lengths[1],
        "tokens_per_s": [rate / 2, rate, 2 * rate],
        "ttft_ms": [10.0],
        "itl_ms": [[1000 / rate] * 3],
        **fields,
    }


def everything() -> list[dict[str, Any]]:
    """FP16 at 200 tok/s, INT8 at 380, INT4 at 500; DeepSpeed 100, HF 60; copies at 3,000 GB/s."""
    return [
        {"kind": "bandwidth", "device": H100, "copy_gb_s": 3000.0, "matrix_tflops": 600.0},
        *(model(b) for b in ("fused-float16", "fused-int8", "fused-int4", "huggingface")),
        model("deepspeed", device=H100),
        cell("fused-float16", (50, 200), 200.0),
        cell("fused-float16", (1000, 50), 200.0, ttft_ms=[99.0, 24.0, 1.0]),
        cell("fused-int8", (50, 200), 380.0),
        cell("fused-int4", (50, 200), 500.0),
        cell("deepspeed", (50, 200), 100.0),
        cell("huggingface", (50, 200), 60.0),
        cell("huggingface", (512, 128), 40.0),
        *(
            {
                "kind": "serving",
                "backend": "fused-float16",
                "path": path,
                "streams": streams,
                "input_tokens": 512,
                "output_tokens": 128,
                "tokens_per_s": rate,
            }
            for path, streams, rate in (
                ("engine", 1, 190.0),
                ("engine", 32, 1200.0),
                ("grpc", 32, 90.0),
            )
        ),
        {"kind": "grpc_cost", "backend": "fused-float16", "added_ms_per_token": 0.3},
    ]


def judged(records: list[dict[str, Any]]) -> dict[str, tuple[float | None, str]]:
    return {bar["bar"]: (bar["value"], bar["verdict"]) for bar in judge_bars(records)}


def test_each_ratio_is_of_its_own_cells_and_its_verdict_of_its_goal() -> None:
    found = judged(everything())
    assert found["FP16, batch 1, over DeepSpeed"] == (2.0, "PASS")
    assert found["FP16, batch 1, over HF eager"] == (3.3333, "MISS")
    assert found["INT8 over FP16"] == (1.9, "PASS")
    assert found["INT4 over FP16"] == (2.5, "MISS")
    assert found["32 streams of 512 / 128 over HF one at a time"] == (30.0, "PASS")
    assert found["gRPC adds, a token"] == (0.3, "MISS")
    # 12.1 GB of weights and 66 MiB of KV in 5 ms.
    share, verdict = found["FP16, batch 1: share of the copy bandwidth"]
    assert share == pytest.approx(
        (weight_pass_bytes(GPT_J_6B, 2.0) + 448 * 1024 * 150) / 15e9, 0.01
    )
    assert verdict == "MISS"
    # 12 TFLOP at 600 TFLOP/s are 19 ms.
    ratio, verdict = found["TTFT at 1,000 tokens over its floor"]
    assert ratio == pytest.approx(24.0 / (prefill_flops(GPT_J_6B, 1000) / 600e9), 0.01)
    assert verdict == "PASS"


def test_weights_and_arithmetic_are_gpt_j_6bs() -> None:
    # 28 blocks of 201,326,592 weights, and lm_head's 206,438,400.
    assert weight_pass_bytes(GPT_J_6B, 1.0) == 28 * 201_326_592 + 206_438_400
    # Attention is 0.23 TFLOP of it at 1,000 tokens.
    assert prefill_flops(GPT_J_6B, 1000) == pytest.approx(
        2 * 1000 * 28 * 201_326_592 + 0.23e12, 1e-3
    )


@pytest.mark.parametrize("kind", ["bandwidth", "model", "cell", "serving", "grpc_cost"])
def test_no_verdict_without_a_measurement(kind: str) -> None:
    whole = judged(everything())
    found = judged([record for record in everything() if record["kind"] != kind])
    assert found != whole
    for name, (value, verdict) in found.items():
        assert (value, verdict) in (whole[name], (None, "not measured"))
    assert {verdict for _, verdict in judged([]).values()} == {"not measured"}


@pytest.mark.parametrize("fields", [{"device": "cpu"}, {"geometry": "tiny"}])
def test_interpreted_or_tiny_models_judge_nothing(fields: dict[str, str]) -> None:
    records = [
        {**record, **fields} if record["kind"] == "model" else record for record in everything()
    ]
    assert {verdict for _, verdict in judged(records).values()} == {"not measured"}


def test_a_goal_that_is_met_exactly_is_met() -> None:
    assert Bar("x", 1.5, 1.5).verdict == "PASS"
    assert Bar("x", 1.5, 1.5, at_most=True).verdict == "PASS"
    assert Bar("x", 1.5, 1.51, at_most=True).verdict == "MISS"


def test_table_of_bars_has_a_line_each_and_says_what_was_not_measured() -> None:
    lines = bars_table(judge_bars(everything()[:1])).splitlines()
    assert len(lines) == 9
    assert all(line.endswith("not measured") for line in lines[1:])
    assert " MISS" in bars_table(judge_bars(everything()))


def test_batch_table_has_a_row_a_backend_and_the_cost_of_launching() -> None:
    def decode(batch: int, ms: float, *, graphs: bool) -> dict[str, Any]:
        return {
            "kind": "decode",
            "backend": "fused-int8",
            "batch_size": batch,
            "graphs": graphs,
            "step_ms": [ms, ms, 9.0],
            "tokens_per_s": 1000 * batch / ms,
        }

    text = batch_table(
        [decode(1, 2.0, graphs=True), decode(4, 4.0, graphs=True), decode(1, 3.5, graphs=False)]
    )
    lines = text.splitlines()
    assert lines[1].split()[-2:] == ["500.0", "1000.0"]
    assert lines[2].split()[-2:] == ["285.7", "-"]
    assert lines[3] == "fused-int8: a step of batch 1 takes 1.500 ms more outside a CUDA graph"
    assert batch_table([]) == kernel_table([]) == profile_table([]) == ""


def test_kernel_table_shows_a_red_kernel_without_figures() -> None:
    good = {"kind": "kernel", "kernel": "embed", "case": "a", "red": False}
    good |= {"us": 12.5, "gb_s": 2700.0, "share_of_copy": 0.905}
    text = kernel_table([good, {"kind": "kernel", "kernel": "sample", "case": "b", "red": True}])
    assert text.splitlines()[1].split()[-4:] == ["12.50", "2700.0", "90.5", "%"]
    assert text.splitlines()[2].endswith("red: not the reference")


def test_profile_table_says_what_of_the_step_is_busy() -> None:
    step = {"kind": "profile_step", "step_us": 4000.0, "busy_us": 3900.0, "clock": "device"}
    row = {"kind": "profile", "name": "_split_kernel", "us": 50.0, "calls": 28.0}
    lines = profile_table([step, row]).splitlines()
    assert lines[0] == "one decode step: 4000.0 us, of which the device is busy 3900.0 us"
    assert lines[1].split() == ["50.00", "us", "28.0", "x", "_split_kernel"]
