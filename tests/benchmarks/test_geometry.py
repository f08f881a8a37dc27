"""Parameter counts against transformers' own modules, and where a model's sizes come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptjet.benchmarks.geometry import GeometryError, config_of, geometry_from_config, named_models

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99, "num_hidden_layers": 3}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("gptj", {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 99, "rotary_dim": 8}),
    ("codegen", {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 99, "rotary_dim": 8}),
    ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 99, "n_positions": 40}),
    (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 2,
            "vocab_size": 99,
            "max_position_embeddings": 40,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    ("gpt_neox", {**SMALL, "intermediate_size": 48}),
    ("opt", {**SMALL, "ffn_dim": 48, "max_position_embeddings": 40, "word_embed_proj_dim": 32}),
    ("llama", {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}),
    ("llama", {**SMALL, "intermediate_size": 48, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_type", "fields"), FAMILIES)
def test_the_count_is_that_of_a_real_model(model_type: str, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = geometry_from_config(config.to_dict())
    assert counted.num_parameters == sum(p.numel() for p in model.parameters())


def test_gpt_j_6b_has_its_known_number_of_parameters() -> None:
    """28 (12 x 4096^2 + 16384 + 3 x 4096) + 2 x 50400 x 4096 + 50400 + 2 x 4096, by hand."""
    geometry = geometry_from_config(config_of("EleutherAI/gpt-j-6B"))
    assert geometry.num_parameters == 6_050_882_784
    # 2 (keys, values) x 28 layers x 4096
    assert geometry.kv_elements_per_token == 229_376


def test_every_named_model_can_be_counted() -> None:
    for name in named_models():
        assert geometry_from_config(config_of(name)).num_parameters > 0


def test_a_folder_is_read_and_needs_no_name(tmp_path: Path) -> None:
    fields = {"model_type": "gptj", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert geometry_from_config(config_of(str(tmp_path))).num_heads == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mixtral"}, "no formula for model_type 'mixtral'"),
        ({"model_type": "gptj", "n_layer": 1, "n_head": 1, "vocab_size": 4}, "has no hidden_size"),
        (
            {"model_type": "gptj", "n_layer": 1, "n_head": 3, "n_embd": 8, "vocab_size": 4},
            "not a multiple of 3 heads",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        geometry_from_config(fields)


def test_a_name_that_would_have_to_be_downloaded_is_refused() -> None:
    with pytest.raises(GeometryError, match="no folder with a config"):
        config_of("somebody/some-model")
