"""A model's sizes, from its config.json: what bytes and FLOPs are counted from. No torch.

The formulas are those of transformers' own modules; tests/benchmarks/test_geometry.py counts the
parameters of a real model of each family and compares.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"
_EMBEDDED_PACKAGE = "gptjet.service.embedded"


class GeometryError(Exception):
    """The sizes cannot be had; the message is one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Parameter counts and sizes of a decoder-only transformer.

    layer_matrix_parameters  weights of one layer's matrices: quantised where the weights are
    layer_vector_parameters  its biases and norms, which stay in the activations' type
    head_parameters          the output projection, read once a step (tied or not)
    embedding_parameters     tables of which a step reads one row: not read, but held
    other_parameters         final norm, head bias
    reduces_per_layer        all-reduces a layer needs when split over cards: 1 where attention and
                             MLP run in parallel and their sum is reduced, else 2
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int | None
    layer_matrix_parameters: int
    layer_vector_parameters: int
    head_parameters: int
    embedding_parameters: int
    other_parameters: int
    reduces_per_layer: int

    @property
    def num_parameters(self) -> int:
        """All of them; a tied head counts once."""
        layer = self.layer_matrix_parameters + self.layer_vector_parameters
        return (
            self.num_layers * layer
            + self.head_parameters
            + self.embedding_parameters
            + self.other_parameters
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


class _Config:
    """config.json with the spellings of transformers' families made one."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields

    def size(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self._fields.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if default is None:
            raise GeometryError(f"config.json has no {' or '.join(names)}")
        return default

    def flag(self, name: str, default: bool) -> bool:
        value = self._fields.get(name, default)
        return default if value is None else bool(value)

    def has(self, name: str) -> bool:
        return bool(self._fields.get(name))


def _parts(
    config: _Config,
    *,
    attention_biases: int,
    norms: int,
    tied: bool,
    positions: int = 0,
    head_bias: bool = False,
    reduces: int = 2,
    gated: bool = False,
) -> dict[str, int]:
    """The counts of a layer and around it; biases and norms in units of the hidden size.

    gated: three MLP matrices without biases and norms without offsets (Llama), else two with both.
    """
    hidden = config.size("hidden_size", "n_embd")
    heads = config.size("num_attention_heads", "n_head", "num_heads")
    kv_heads = config.size("num_key_value_heads", default=heads) if gated else heads
    head_dim = config.size("head_dim", default=hidden // heads) if gated else hidden // heads
    inner = config.size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    vocab = config.size("vocab_size")
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = (3 if gated else 2) * hidden * inner
    norm = hidden if gated else 2 * hidden
    table = vocab * hidden
    return {
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "layer_matrix_parameters": attention + mlp,
        "layer_vector_parameters": (
            attention_biases * hidden + norms * norm + (0 if gated else inner + hidden)
        ),
        "head_parameters": table,
        "embedding_parameters": (0 if tied else table) + positions * hidden,
        "other_parameters": norm + (vocab if head_bias else 0),
        "reduces_per_layer": reduces,
    }


def _gptj(config: _Config) -> dict[str, int]:
    tied = config.flag("tie_word_embeddings", False)
    return _parts(config, attention_biases=0, norms=1, tied=tied, head_bias=True, reduces=1)


def _gpt2(config: _Config) -> dict[str, int]:
    positions = config.size("n_positions", "max_position_embeddings")
    tied = config.flag("tie_word_embeddings", True)
    return _parts(config, attention_biases=4, norms=2, tied=tied, positions=positions)


def _gpt_neo(config: _Config) -> dict[str, int]:
    positions = config.size("max_position_embeddings")
    tied = config.flag("tie_word_embeddings", True)
    return _parts(config, attention_biases=1, norms=2, tied=tied, positions=positions)


def _gpt_neox(config: _Config) -> dict[str, int]:
    biases = 4 if config.flag("attention_bias", True) else 0
    reduces = 1 if config.flag("use_parallel_residual", True) else 2
    tied = config.flag("tie_word_embeddings", False)
    return _parts(config, attention_biases=biases, norms=2, tied=tied, reduces=reduces)


def _opt(config: _Config) -> dict[str, int]:
    hidden = config.size("hidden_size")
    if config.size("word_embed_proj_dim", default=hidden) != hidden:
        raise GeometryError("OPT with word_embed_proj_dim other than hidden_size is not counted")
    # OPT's position table has an offset of two rows.
    positions = config.size("max_position_embeddings") + 2
    tied = config.flag("tie_word_embeddings", True)
    return _parts(config, attention_biases=4, norms=2, tied=tied, positions=positions)


def _llama(config: _Config) -> dict[str, int]:
    if config.flag("attention_bias", False) or config.flag("mlp_bias", False):
        raise GeometryError("Llama with attention_bias or mlp_bias is not counted")
    tied = config.flag("tie_word_embeddings", False)
    return _parts(config, attention_biases=0, norms=2, tied=tied, gated=True)


_FAMILIES: dict[str, Callable[[_Config], dict[str, int]]] = {
    "gptj": _gptj,
    "codegen": _gptj,
    "gpt2": _gpt2,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "llama": _llama,
    "mistral": _llama,
}


def geometry_from_config(fields: Mapping[str, Any]) -> Geometry:
    """Count a model from the fields of its config.json.

    Raises GeometryError for a family without a formula and for a missing field.
    """
    model_type = str(fields.get("model_type", ""))
    family = _FAMILIES.get(model_type)
    if family is None:
        raise GeometryError(
            f"no formula for model_type {model_type!r}: there is one for {', '.join(_FAMILIES)}"
        )
    config = _Config(fields)
    context = config.size("max_position_embeddings", "n_positions", "n_ctx", default=0) or None
    layers = config.size("num_hidden_layers", "n_layer", "num_layers")
    counts = family(config)
    if counts["hidden_size"] % counts["num_heads"] and not config.has("head_dim"):
        raise GeometryError(
            f"hidden size {counts['hidden_size']} is not a multiple of {counts['num_heads']} heads"
        )
    return Geometry(model_type=model_type, num_layers=layers, max_context=context, **counts)


def named_models() -> dict[str, dict[str, Any]]:
    """The tables of models.toml by name."""
    text = (resources.files("gptjet.benchmarks") / "models.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def config_of(model: str) -> dict[str, Any]:
    """The config.json fields of a folder, of "embedded", or of a name in models.toml.

    Raises GeometryError where there are none: a hub name that models.toml does not know would have
    to be downloaded, and a plan must not do that.
    """
    folder = embedded_folder() if model == EMBEDDED else Path(model)
    file = folder if folder.name == "config.json" else folder / "config.json"
    if file.is_file():
        return _read_json(file)
    for name, entry in named_models().items():
        names = {name.lower(), *(alias.lower() for alias in entry.get("aliases", ()))}
        if model.lower() in names:
            return dict(entry["config"])
    if model == EMBEDDED:
        raise GeometryError("the embedded checkpoint is not installed: its config.json is missing")
    raise GeometryError(
        f"{model}: no folder with a config.json, and not one of {', '.join(named_models())}"
    )


def embedded_folder() -> Path:
    """Where the embedded checkpoint lies: it is package data, not code, so nothing is called."""
    return Path(str(resources.files(_EMBEDDED_PACKAGE)))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GeometryError(f"{path}: {error}") from error
    if not isinstance(fields, dict):
        raise GeometryError(f"{path}: not a JSON object")
    return fields
