"""`gptjet plan` against numbers calculated by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptjet.benchmarks.config import ConfigError
from gptjet.benchmarks.geometry import GeometryError
from gptjet.benchmarks.hardware import GIB
from gptjet.benchmarks.plan import describe, make_plan
from gptjet.service.cli import app

WEIGHTS_FP16 = 2 * 6_050_882_784


def test_gpt_j_6b_in_fp16_fits_a_t4_with_three_full_contexts() -> None:
    """15 GiB less 1 GiB kept free less the weights, at 448 KiB a token in blocks of 16."""
    plan = make_plan("gpt-j-6b", "t4", "fp16")
    (one,) = plan.placements
    free = 14 * GIB - WEIGHTS_FP16
    assert one.fits
    assert one.weight_bytes_per_card == WEIGHTS_FP16
    assert one.kv_tokens == free // (448 * 1024) // 16 * 16 == 6384
    assert one.full_context_streams == 6384 // 2048 == 3
    assert one.speed is not None
    assert dict(one.speed.tokens_per_s)[1] == pytest.approx(27.4, abs=0.05)
    assert one.speed.bound == "bandwidth"


def test_what_does_not_fit_says_by_how_much() -> None:
    (one,) = make_plan("gpt-j-6b", "t4", "fp32").placements
    assert not one.fits
    missing = (4 * 6_050_882_784 - 14 * GIB) / GIB
    assert one.reason == f"the weights need {missing:.1f} GiB more than a card has"
    assert (one.kv_tokens, one.full_context_streams, one.speed) == (0, 0, None)


def test_weights_that_leave_no_room_for_a_context_do_not_fit() -> None:
    (one,) = make_plan("gpt-j-6b", "t4", "fp16", context=8000).placements
    assert not one.fits
    assert one.reason == "the weights fit, a context of 8000 does not: 6384 tokens do"


def test_two_cards_as_a_pair_and_as_replicas() -> None:
    one, pair, replicas = make_plan("gpt-j-6b", "t4", "fp16", cards=2).placements
    assert pair.weight_bytes_per_card * 2 == one.weight_bytes_per_card
    assert pair.kv_tokens > 2 * one.kv_tokens, "half the weights leave more room on each card"
    assert replicas.kv_tokens == 2 * one.kv_tokens
    assert replicas.full_context_streams == 6
    assert one.speed
    assert pair.speed
    assert replicas.speed
    alone = dict(one.speed.tokens_per_s)[2048]
    # The all-reduces cost something, so a pair is faster but not twice as fast.
    assert alone < dict(pair.speed.tokens_per_s)[2048] < 2 * alone
    assert replicas.speed.tokens_per_s == one.speed.tokens_per_s, "a stream is no faster"
    assert replicas.speed.batch_tokens_per_s == 2 * one.speed.batch_tokens_per_s


def test_an_all_reduce_a_layer_is_added_for_the_pair() -> None:
    """28 layers x (20 us + 8192 B / 15.75 GB/s), GPT-J having one sum a layer."""
    one, pair, _ = make_plan("gpt-j-6b", "t4", "fp16", cards=2).placements
    assert one.speed
    assert pair.speed
    step_ms = 1000 / dict(one.speed.tokens_per_s)[1]
    pair_ms = 1000 / dict(pair.speed.tokens_per_s)[1]
    reduce_ms = 28 * (0.020 + 8192 / 15.75e9 * 1000)
    assert pair_ms == pytest.approx(step_ms / 2 + reduce_ms)


def test_a_model_that_does_not_fit_one_card_can_fit_two() -> None:
    one, pair, replicas = make_plan("gpt-j-6b", "v100", "fp32", cards=2).placements
    assert [one.fits, pair.fits, replicas.fits] == [False, True, False]


def test_heads_that_do_not_divide_cannot_be_split(tmp_path: Path) -> None:
    fields = {"model_type": "gptj", "n_embd": 12, "n_head": 3, "n_layer": 1, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"n_positions": 64}))
    plan = make_plan(str(tmp_path), "t4", "fp16", cards=2)
    assert plan.placements[1].reason == "3 KV heads do not divide over 2 cards"
    assert plan.model == tmp_path.name, "a path names a machine"


def test_hardware_without_a_datasheet_has_no_speed_until_it_is_measured() -> None:
    (one,) = make_plan("small", "cpu", "fp32").placements
    assert one.fits
    assert one.speed is None
    rates = {"read_gb_s": 20.0, "copy_gb_s": 20.0, "matrix_tflops": {"fp32": 0.1}}
    (one,) = make_plan("small", "cpu", "fp32", bandwidth=rates).placements
    assert one.speed is not None
    assert one.speed.basis == "measured"


def test_two_machines_without_a_known_interconnect_are_noted() -> None:
    """What they exchange would be free, and the pair twice as fast as one."""
    rates = {"read_gb_s": 20.0, "copy_gb_s": 20.0, "matrix_tflops": {"fp32": 0.1}}
    plan = make_plan("small", "cpu", "fp32", cards=2, bandwidth=rates)
    (note,) = plan.notes
    assert note.startswith("no interconnect is known for cpu: what two of them exchange")
    assert make_plan("small", "cpu", "fp32", bandwidth=rates).notes == ()
    assert make_plan("small", "t4", "fp32", cards=2).notes == ()


def test_measuring_this_machine_for_a_card_with_a_datasheet_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "gptjet.benchmarks.bandwidth.measure_in_subprocess", lambda *_: pytest.fail("measured")
    )
    result = CliRunner().invoke(app, ["plan", "--card", "t4", "--measure"])
    assert result.exit_code == 2
    assert "--measure is for hardware without a datasheet; t4 has one" in result.output


def test_a_type_the_card_has_no_units_for_is_noted() -> None:
    plan = make_plan("gpt-j-6b", "t4", "bf16")
    assert plan.notes == ("no bf16 units: computed at the FP32 rate",)


def test_the_text_says_that_it_is_modelled() -> None:
    lines = describe(make_plan("gpt-j-6b", "t4", "int8", cards=2))
    text = "\n".join(lines)
    assert "one card: fits" in text
    assert "replicas x 2: fits" in text
    assert text.endswith("All of it is modelled: a ceiling to design by, not a measurement.")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("gpt-j-6b", "t4", "fp8"), ConfigError),
        (("gpt-j-6b", "t5", "fp16"), ConfigError),
        (("nobody/nothing", "t4", "fp16"), GeometryError),
    ],
)
def test_what_cannot_be_planned_is_an_error(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        make_plan(*arguments)


def test_the_command_prints_json_without_torch_and_exits_1_where_it_does_not_fit() -> None:
    script = (
        "import sys, typer\nfrom gptjet.benchmarks.cli_plan import plan\n"
        "try:\n    typer.run(plan)\nfinally:\n    assert 'torch' not in sys.modules"
    )
    codes = []
    for weights in ("fp16", "fp32"):
        result = subprocess.run(
            [sys.executable, "-c", script, "--card=t4", f"--weights={weights}", "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stderr == ""
        codes.append((result.returncode, json.loads(result.stdout)["fits"]))
    assert codes == [(0, True), (1, False)]


def test_an_int8_kv_cache_takes_17_bytes_where_float16_takes_32() -> None:
    """A row of scales beside sixteen tokens of a byte an element."""
    half = make_plan("gpt-j-6b", "t4", "fp16")
    int8 = make_plan("gpt-j-6b", "t4", "fp16", kv_cache_dtype="int8")
    assert int8.kv_bytes_per_token == 448 * 1024 * 17 // 32 == 238 * 1024
    (one,) = int8.placements
    free = 14 * GIB - WEIGHTS_FP16
    assert one.kv_tokens == free // (238 * 1024) // 16 * 16 == 12016
    assert one.full_context_streams == 5
    assert one.speed is not None
    assert half.placements[0].speed is not None
    faster = one.speed.tokens_per_s[-1][1] / half.placements[0].speed.tokens_per_s[-1][1]
    read = 2 * 5_844_441_184 + 2048 * 448 * 1024
    assert faster == pytest.approx(read / (read - 2048 * 210 * 1024), rel=1e-3)
    assert "KV cache 238 KiB a token in int8" in "\n".join(describe(int8))
    assert make_plan("gpt-j-6b", "t4", "int8", kv_cache_dtype="float32").kv_bytes_per_token == (
        2 * half.kv_bytes_per_token
    )


def test_kv_cache_dtypes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown KV cache dtype 'int4': auto, float16"):
        make_plan("gpt-j-6b", "t4", "fp16", kv_cache_dtype="int4")
    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 100}
    config = {"model_type": "gptj", "rotary_dim": 16, "n_inner": None} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GeometryError, match="heads of 64 features or more, these have 32"):
        make_plan(str(tmp_path), "t4", "fp16", kv_cache_dtype="int8")
