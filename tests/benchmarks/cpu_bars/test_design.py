"""Races: who is in them, which cells they run, and prompts that share nothing by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptjet.benchmarks.cpu_bars.checkpoints import CONTEXT, MODELS, BarModel, checkpoint_folder
from gptjet.benchmarks.cpu_bars.design import (
    STREAMS,
    Cell,
    CellKind,
    Entry,
    make_races,
)
from gptjet.benchmarks.geometry import config_of


def test_fp32_and_the_quantised_types_are_races_of_their_own() -> None:
    fp32, quantised, *_ = make_races(["M"])
    assert [str(entry) for entry in fp32.entries] == [
        "engine:fused/fp32",
        "gptjet:fused/fp32",
        "engine:huggingface/fp32",
        "ctranslate2/fp32",
        "transformers-compiled/fp32",
    ]
    assert [str(entry) for entry in quantised.entries] == [
        "engine:fused/int8",
        "gptjet:fused/int8",
        "engine:fused/int4",
        "gptjet:fused/int4",
        "ctranslate2/int8",
        "openvino/int8",
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_every_cell_fits_the_context_and_the_kv_cache_asked_for(quick: bool) -> None:
    for race in make_races(list(MODELS), quick=quick):
        for cell in race.cells:
            streams = STREAMS if cell.kind in (CellKind.STREAMS, CellKind.COST) else 1
            tail = 16 if cell.kind is CellKind.PREFIX else 0
            tokens = cell.input_tokens + tail + cell.output_tokens
            if cell.kind is CellKind.CHUNKS:
                tokens = cell.input_tokens + 1
                assert race.kv_cache_tokens >= tokens + 4 * (32 + cell.output_tokens)
            assert tokens <= CONTEXT
            assert streams * (-(-tokens // 16) * 16) <= race.kv_cache_tokens


def test_ours_holds_no_more_than_the_largest_cell_needs() -> None:
    """At M a prompt of 1,000 tokens and one more, in blocks of 16; at S eight streams of 160."""
    tokens = {race.key: race.kv_cache_tokens for race in make_races(["S", "M"])}
    assert tokens["M/fp32"] == tokens["M/quantised"] == 1008
    assert tokens["S/fp32"] == 8 * 160


def test_what_holds_another_kv_cache_or_is_another_variant_is_a_race_of_its_own() -> None:
    *_, chunks, deterministic = make_races(["M"])
    assert [str(entry) for entry in chunks.entries] == [
        f"engine:fused/{weight_type}" for weight_type in ("fp32", "int8", "int4")
    ]
    assert [str(entry) for entry in deterministic.entries] == [
        "engine:fused/fp32",
        "engine:fused+deterministic/fp32",
        "engine:fused+torch/fp32",
        "engine:fused+torch+deterministic/fp32",
    ]
    assert [race.name for race in make_races(["W"])] == ["fp32", "quantised"]


def test_the_full_prefill_is_of_a_thousand_tokens_and_the_prefix_of_512() -> None:
    for race in make_races(list(MODELS)):
        lengths = {cell.kind: cell.input_tokens for cell in race.cells}
        if race.name in ("chunks", "deterministic"):
            continue
        assert (lengths[CellKind.PREFILL], lengths[CellKind.PREFIX]) == (1000, 512)


def test_only_our_own_engine_runs_streams_and_prefixes() -> None:
    fp32, *_ = make_races(["S"])
    cells = {cell.kind: cell for cell in fp32.cells}
    for kind in (CellKind.STREAMS, CellKind.PREFIX):
        taking_part = [str(e) for e in fp32.entries if fp32.runs_cell(e, cells[kind])]
        assert taking_part == ["engine:fused/fp32"]
    assert all(fp32.runs_cell(entry, cells[CellKind.DECODE]) for entry in fp32.entries)


def test_with_the_reference_as_ours_nobody_is_there_twice() -> None:
    fp32, _ = make_races(["W"], "huggingface")
    names = [entry.contestant for entry in fp32.entries]
    assert names == ["engine:huggingface", "gptjet:huggingface", "ctranslate2"]
    cells = {cell.kind: cell for cell in fp32.cells}
    assert fp32.runs_cell(Entry("engine:huggingface", "fp32"), cells[CellKind.PREFIX])


def test_no_two_prompts_begin_alike() -> None:
    """A shared beginning would be answered from the prefix cache, and a prefill would look free."""
    cells = [Cell(CellKind.DECODE, 32, 8, 3), Cell(CellKind.PREFILL, 64, 1, 3)]
    prompts = [
        cell.prompt("S", number, 4096, name)[:8]
        for cell in cells
        for number in (-1, 0, 1, 2)
        for name in ("", "second")
    ]
    assert len(set(prompts)) == len(prompts)
    assert cells[0].prompt("S", 0, 4096) == cells[0].prompt("S", 0, 4096)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no model 'X': S, M, W"):
        make_races(["X"])


def test_the_models_are_the_three_of_the_bars() -> None:
    sizes = {
        name: tuple(config_of(model.source)[field] for field in ("n_layer", "n_embd", "vocab_size"))
        for name, model in MODELS.items()
    }
    assert sizes == {"S": (4, 256, 4096), "M": (24, 1024, 50400), "W": (2, 4096, 50400)}


def test_a_checkpoint_is_written_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = BarModel("T", "small", "for a test")
    folder = checkpoint_folder(small, tmp_path)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors"}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert checkpoint_folder(small, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    embedded = checkpoint_folder(MODELS["S"], tmp_path)
    assert config_of(str(embedded))["n_positions"] == CONTEXT

    from gptjet.benchmarks.cpu_bars import checkpoints

    def killed(folder: Path, *_: object, **__: object) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_folder(MODELS["M"], tmp_path)
    assert not (tmp_path / "checkpoints" / "M").exists()
