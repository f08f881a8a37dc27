"""The bundled configurations, what they say was published, and a user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptjet.benchmarks.config import (
    ConfigError,
    bundled_configs,
    config_for,
    load_all_bundled,
    load_config,
)
from gptjet.benchmarks.design import cells
from gptjet.benchmarks.hardware import mismatch, present_name
from gptjet.benchmarks.published import disagreements

T4_MACHINE = {"gpus": [{"name": "Tesla T4"}]}
CPU_MACHINE: dict[str, object] = {"gpus": []}


def test_the_configurations_that_are_promised_ship_and_are_valid() -> None:
    assert set(bundled_configs()) == {"t4", "v100", "a10", "h100", "cpu", "cpu-embedded"}
    assert len(load_all_bundled()) == 6


def test_t4_and_v100_are_the_published_64_cells_of_20_runs() -> None:
    found = [
        (config.hardware.name, cell.level.backend, cell.input_tokens, cell.output_tokens)
        for config in (load_config("t4"), load_config("v100"))
        for cell in cells(config, config.design.choose_levels())
    ]
    expected = {
        (card, backend, input_tokens, output_tokens)
        for card in ("t4", "v100")
        for backend in ("huggingface", "deepspeed")
        for input_tokens in (50, 200, 500, 1000)
        for output_tokens in (50, 100, 150, 200)
    }
    assert len(found) == 64
    assert set(found) == expected
    assert {load_config(name).design.runs for name in ("t4", "v100")} == {20}
    instances = [load_config(name).hardware.instance for name in ("t4", "v100")]
    assert [i.name for i in instances if i] == ["ml.g4dn.2xlarge", "ml.p3.2xlarge"]


def test_the_published_table_stands_in_the_configuration_files() -> None:
    """The table of issue 4, row by row."""
    rows = {}
    for name in ("t4", "v100"):
        (result,) = [r for r in load_config(name).published if r.same_design]
        rows[name] = (
            result.baseline.tokens_per_s,
            result.baseline.tokens_per_s_sd,
            result.treatment.tokens_per_s,
            result.treatment.tokens_per_s_sd,
            result.latency_reduction,
            result.latency_reduction_sd,
            dict(result.latency_reduction_by_input),
        )
    assert rows == {
        "t4": (12.5, 0.91, 16.5, 2.13, 0.24, 0.05, {50: 0.31, 1000: 0.15}),
        "v100": (21.9, 1.97, 47.5, 5.8, 0.53, 0.07, {50: 0.62, 1000: 0.40}),
    }


def test_the_280_ms_a_step_disagree_with_21_9_tokens_a_second() -> None:
    (found,) = disagreements(load_all_bundled())
    assert (found.hardware, found.quoted_step_ms, found.tokens_per_s) == ("v100", 280.0, 21.9)
    assert found.implied_step_ms == pytest.approx(45.66, abs=0.01)
    assert "6.1 times less" in found.sentence()


def test_further_levels_are_reached_by_name_only() -> None:
    design = load_config("t4").design
    assert [str(x) for x in design.choose_levels()] == ["huggingface/fp16", "deepspeed/fp16"]
    assert [str(x) for x in design.choose_levels(["fused"])] == [
        "fused/fp16",
        "fused/int8",
        "fused/int4",
    ]
    assert [str(x) for x in design.choose_levels([], ["int8"])] == ["fused/int8"]
    assert [str(x) for x in design.choose_levels(["fused", "deepspeed"], ["fp16"])] == [
        "fused/fp16",
        "deepspeed/fp16",
    ]


@pytest.mark.parametrize(
    ("backends", "weight_types", "message"),
    [
        (["vllm"], [], "no backend 'vllm'"),
        ([], ["fp8"], "unknown weight type 'fp8'"),
        (["deepspeed"], ["int8"], "no level of the design is left"),
    ],
)
def test_a_level_that_is_not_there_is_an_error(
    backends: list[str], weight_types: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("t4").design.choose_levels(backends, weight_types)


def test_a_users_own_file_works_the_same_way(tmp_path: Path) -> None:
    text = (bundled_configs()["t4"]).read_text(encoding="utf-8")
    file = tmp_path / "mine.toml"
    file.write_text(text.replace("runs = 20", "runs = 7"))
    config = load_config(str(file))
    assert (config.name, config.design.runs) == ("mine", 7)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("runs = 20", "rums = 20", "design.rums"),
        ("runs = 20", "runs = 0", "design.runs: .*greater than or equal to 1"),
        ("input_tokens = [50, 200", "input_tokens = [50, 50", "holds a length twice"),
        ('deepspeed = ["fp16"]', 'deepspeed = ["fp17"]', "unknown weight type 'fp17'"),
        ("bandwidth_gb_s = 320.0", "bandwidth_gb_s = -1", "hardware.bandwidth_gb_s"),
        (r"device_pattern = '\bT4\b'", "device_pattern = '('", "not a regular expression"),
        ("tokens_per_s = 12.5,", "", "give tokens_per_s or ms_per_token"),
        ("[design]", "[design", "t4.toml"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (bundled_configs()["t4"]).read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "t4.toml"
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_config(str(file))


def test_hardware_that_is_not_here_is_seen() -> None:
    t4, cpu = load_config("t4").hardware, load_config("cpu").hardware
    assert mismatch(t4, T4_MACHINE) is None
    assert mismatch(cpu, T4_MACHINE) is None, "every machine has a CPU"
    assert "shows no NVIDIA GPU" in str(mismatch(t4, CPU_MACHINE))
    assert "NVIDIA L4" in str(mismatch(t4, {"gpus": [{"name": "NVIDIA L4"}]}))


def test_the_machine_chooses_its_configuration() -> None:
    assert config_for(CPU_MACHINE) == "cpu"
    assert config_for(T4_MACHINE) == "t4"
    assert config_for({"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}) == "h100"
    with pytest.raises(ConfigError, match="GeForce"):
        config_for({"gpus": [{"name": "NVIDIA GeForce RTX 4090"}]})
    assert (
        present_name({"gpus": [{"name": "NVIDIA GeForce RTX 4090"}]}) == "nvidia-geforce-rtx-4090"
    )
    assert present_name(CPU_MACHINE) == "cpu"


def test_the_cpu_design_is_64_cells_of_the_baseline_and_the_fused_backend() -> None:
    cpu = load_config("cpu")
    levels = [str(level) for level in cpu.design.choose_levels()]
    assert levels == ["huggingface/fp32", "huggingface/bf16", "fused/fp32", "fused/int8"]
    assert len(list(cells(cpu, cpu.design.choose_levels()))) == 64
    chosen = cpu.design.choose_levels(["huggingface", "fused"], ["fp32"])
    assert [str(level) for level in chosen] == ["huggingface/fp32", "fused/fp32"]
    assert str(cpu.design.choose_levels(["fused"], ["int4"])[0]) == "fused/int4"
