"""The random checkpoint is one that transformers loads, and the same everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gptjet.benchmarks.make_checkpoint import write_checkpoint


def test_transformers_loads_every_weight_and_the_tokenizer_has_every_id(tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GPTJForCausalLM

    config = write_checkpoint(tmp_path, "small", context=640)
    model, told = GPTJForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.n_positions == 640
    assert next(model.parameters()).dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config["vocab_size"] == 4096
    assert tokenizer("A b")["input_ids"] == [65, 32, 98]
    assert tokenizer.decode([65, 32, 98]) == "A b"
    assert tokenizer.eos_token_id == 256


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        write_checkpoint(tmp_path / name, "small", seed=seed)
        return hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


def test_only_gpt_j_geometries_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a gptj"):
        write_checkpoint(tmp_path, "gpt2")
