"""Measuring the kernels on random weights, over PyTorch references in the kernels' place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from gptjet.kernels.gpu import availability
from gptjet.kernels.gpu.operations import reference_operations
from gptjet.kernels.weights import dequantize
from gptjet.service.backends.fused import gpu, measure, timing
from gptjet.service.backends.fused.random_weights import (
    GEOMETRIES,
    RandomWeights,
    count_parameters,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "interpret_on_cpu", False)  # what a measurement sets is taken back
    monkeypatch.setattr(gpu, "triton_operations", reference_operations)
    monkeypatch.setattr(availability, "check_launch", lambda _: None)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = measure.main([*arguments, "--geometry", "tiny", "--device", "cpu"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_gpt_j_6bs_parameters_are_counted() -> None:
    assert count_parameters(GEOMETRIES["gpt-j-6b"]) == 6_050_882_784


def test_a_layer_is_the_same_at_every_call_and_no_two_layers_are() -> None:
    weights = RandomWeights(GEOMETRIES["tiny"], "float16", CPU)
    one, again, other = weights.layer(0), weights.layer(0), weights.layer(1)
    assert torch.equal(dequantize(one.w_in), dequantize(again.w_in))
    assert not torch.equal(dequantize(one.w_in), dequantize(other.w_in))
    assert torch.equal(weights.head().embedding, weights.head().embedding)


@pytest.mark.parametrize(("weight_type", "limit"), [("int8", 0.01), ("int4", 0.1)])
def test_quantised_models_are_the_float_one_rounded(weight_type: str, limit: float) -> None:
    exact = RandomWeights(GEOMETRIES["tiny"], "float16", CPU).layer(0)
    rounded = RandomWeights(GEOMETRIES["tiny"], weight_type, CPU).layer(0)
    values = dequantize(exact.w_out)
    assert 0 < float((dequantize(rounded.w_out) - values).abs().max() / values.abs().max()) < limit
    assert rounded.w_in.bias is not None
    assert torch.equal(rounded.w_in.bias[:96], torch.zeros(96))  # q, k and v have none


@pytest.mark.parametrize("weight_type", ["float16", "int8", "int4"])
def test_parity_against_transformers_proves_the_model(
    weight_type: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, records = run(capsys, "parity", "--weight-type", weight_type)
    assert code == 0
    assert [r["kind"] for r in records] == ["model", "parity", "proof"]
    assert records[1]["status"] == "passed"
    assert ("against the float weights" in records[1]["detail"]) == (weight_type != "float16")
    assert records[2] == {
        "kind": "proof",
        "subject": f"model/{weight_type}",
        "passed": True,
        "cases": 2,
    }


def test_a_model_that_computes_something_else_is_proven_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    right = reference_operations()

    def no_norm_bias(x: Any, weight: Any, bias: Any, *rest: Any, **options: Any) -> None:
        right.layer_norm_linear(x, weight, torch.zeros_like(bias), *rest, **options)

    wrong = dataclasses.replace(right, layer_norm_linear=no_norm_bias)
    monkeypatch.setattr(gpu, "triton_operations", lambda: wrong)
    code, records = run(capsys, "parity")
    assert code == 1
    assert [r["kind"] for r in records] == ["model", "parity", "proof", "error"]
    assert records[2]["passed"] is False


def test_latency_has_cells_then_batches(capsys: pytest.CaptureFixture[str]) -> None:
    code, records = run(
        capsys, "latency", "--cells", "5:4", "--batches", "1,3", "--steps", "2", "--repeats", "2"
    )
    assert code == 0
    assert [r["kind"] for r in records] == ["model", "cell", "decode", "decode", "memory"]
    cell = records[1]
    assert (cell["backend"], len(cell["ttft_ms"])) == ("fused-float16", 2)
    assert [len(run) for run in cell["itl_ms"]] == [3, 3]
    assert [(r["batch_size"], len(r["step_ms"]), r["graphs"]) for r in records[2:4]] == [
        (1, 2, False),
        (3, 2, False),
    ]
    assert records[0]["interpreted"] is True


def test_profile_accounts_for_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    code, (model, step, *rows) = run(capsys, "profile", "--steps", "2")
    assert (code, model["kind"], step["kind"]) == (0, "model", "profile_step")
    assert rows
    assert {row["kind"] for row in rows} == {"profile"}
    assert sum(row["us"] for row in rows) <= step["busy_us"] + 0.1
    assert [row["us"] for row in rows] == sorted((row["us"] for row in rows), reverse=True)


def test_steps_feed_each_token_to_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps launched ahead of their ids say what one pass over all tokens at once would."""
    del capsys
    subject = measure.subject_of("tiny", "float16", "cpu")
    backend = measure.build_backend(subject, max_sequences=1, max_tokens=16)
    runner, said = backend.runner, []
    launch = runner.decode_and_sample

    def watched(*arguments: Any) -> Any:
        launched = launch(*arguments)
        said.append(launched.wait())
        return launched

    runner.decode_and_sample = watched  # type: ignore[method-assign]
    assert len(timing.time_steps(runner, [7], [0], [[0]], 4)) == 4
    tokens = [7, *(ids[0] for ids in said)]
    rows = runner.run([timing.Segment(tokens[:-1], 0, [0], wanted=4)])
    assert rows.argmax(1).tolist() == tokens[1:]
    backend.close()


def test_a_step_whose_logits_are_not_finite_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = measure.subject_of("tiny", "float16", "cpu")
    backend = measure.build_backend(subject, max_sequences=1, max_tokens=16)
    backend.runner.kv_cache.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        timing.time_steps(backend.runner, [0], [3], [[0]], 1)


def test_blocks_of_sequences_are_their_own() -> None:
    rows = timing.Rows.allocate(3, 33)
    assert rows.num_blocks == 9
    assert sorted(block for table in rows.tables for block in table) == list(range(9))


def test_a_cpu_without_the_interpreter_is_unavailable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code, records = run(capsys, "latency")
    assert (code, records[0]["unavailable"]) == (2, True)
