"""How a quantised checkpoint was made: what its files say, and what they must hold.

`gptjet quantize` writes the recipe into config.json (`quantization_config`, with the files'
checksums) and, without those, into each safetensors file's own metadata.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjet.kernels.batch import BlockGeometry
from gptjet.kernels.weights import INT4_GROUP
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import QUANT_METHOD, Checkpoint
from gptjet.service.models.safetensors_header import TensorInfo

CONFIG_KEY = "quantization_config"
METADATA_KEY = "gptjet_recipe"
FORMAT_VERSION = 1
BITS = (4, 8)

EMBEDDING = "embedding.weight"
FINAL_NORM = "final_norm"
LM_HEAD = "lm_head"
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What was done to a checkpoint.

    method       "rtn" (round to nearest) or "gptq"
    bits         8: one scale an output feature; 4: one scale a group of input features
    group        input features of a group, None for 8 bits
    calibration  {"text", "sha256", "tokens"} of what gptq rounded against, else None
    source       {"model", "config_sha256"} of the original
    geometry     BlockGeometry's fields
    versions     of the packages that did it
    """

    method: str
    bits: int
    group: int | None
    calibration: Mapping[str, Any] | None
    source: Mapping[str, Any]
    geometry: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def weight_type(self) -> str:
        """ "int8" or "int4"."""
        return f"int{self.bits}"

    def as_dict(self) -> dict[str, Any]:
        """JSON of the fields, with what marks it as ours."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "weight_type": self.weight_type,
        } | dataclasses.asdict(self)


def config_sha256(config: Mapping[str, Any]) -> str:
    """Of a config.json without its quantization_config, whatever the order of its fields."""
    fields = {name: value for name, value in config.items() if name != CONFIG_KEY}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal, of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_recipe(checkpoint: Checkpoint) -> tuple[Recipe, Mapping[str, str]]:
    """The recipe of a quantised checkpoint, and its weight files' checksums by name.

    Raises BackendLoadError naming the field that is missing, or that this engine does not compute.
    """
    where = f"{checkpoint.path / 'config.json'}: {CONFIG_KEY}"
    stored = checkpoint.config[CONFIG_KEY]
    if stored.get("format_version") != FORMAT_VERSION:
        raise BackendLoadError(
            f"{where}.format_version is {stored.get('format_version')!r}; this gptjet reads "
            f"{FORMAT_VERSION}: quantise the model again with `gptjet quantize`"
        )
    names = [field.name for field in dataclasses.fields(Recipe)]
    missing = [name for name in (*names, "sha256") if name not in stored]
    if missing:
        raise BackendLoadError(f"{where} lacks {', '.join(missing)}")
    recipe = Recipe(**{name: stored[name] for name in names})
    if recipe.bits not in BITS:
        raise BackendLoadError(f"{where}.bits is {recipe.bits!r}; this gptjet computes 4 and 8")
    group = INT4_GROUP if recipe.bits == 4 else None
    if recipe.group != group:
        raise BackendLoadError(
            f"{where}.group is {recipe.group}; this gptjet computes {group} with {recipe.bits} "
            f"bits: quantise the model again with `gptjet quantize`"
        )
    for name in ("geometry", "sha256"):
        if not isinstance(stored[name], Mapping):
            raise BackendLoadError(f"{where}.{name} is no object")
    return recipe, stored["sha256"]


def check_geometry(checkpoint: Checkpoint, recipe: Recipe, geometry: BlockGeometry) -> None:
    """Refuse weights that were quantised for another model than config.json describes.

    Raises BackendLoadError naming the sizes that differ.
    """
    differing = [
        f"{name} {recipe.geometry.get(name)} (config.json has {value})"
        for name, value in dataclasses.asdict(geometry).items()
        if recipe.geometry.get(name) != value
    ]
    if differing:
        raise BackendLoadError(
            f"{checkpoint.path}: the weights were quantised for another model: "
            f"{', '.join(differing)}"
        )


def check_files(checkpoint: Checkpoint, recipe: Recipe, checksums: Mapping[str, str]) -> None:
    """Refuse files that are not the ones the recipe was written for.

    Raises BackendLoadError: another recipe in a file's metadata, or another checksum.
    """
    from safetensors import safe_open

    for path in checkpoint.weight_files:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        try:
            stored = json.loads(metadata.get(METADATA_KEY, "null"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict):
            raise BackendLoadError(
                f"{path} holds no recipe of `gptjet quantize`, and config.json says that it does"
            )
        differing = [
            f"{name} {stored.get(name)!r} (config.json has {value!r})"
            for name, value in json.loads(json.dumps(recipe.as_dict())).items()
            if stored.get(name) != value
        ]
        if differing:
            raise BackendLoadError(f"{path} was made otherwise: {', '.join(differing)}")
        if path.name not in checksums:
            raise BackendLoadError(f"{path} is not among the files that config.json lists")
        if file_sha256(path) != checksums[path.name]:
            raise BackendLoadError(
                f"{path} is corrupt, or of another run of `gptjet quantize`: its sha256 is not "
                f"the one in config.json"
            )


def expected_tensors(geometry: BlockGeometry, bits: int) -> dict[str, TensorInfo]:
    """Every tensor of a quantised checkpoint by name; the embedding may also be F32."""
    hidden, vocab = geometry.hidden_size, geometry.vocab_size
    attention = geometry.num_heads * geometry.head_dim
    tensors = {
        EMBEDDING: TensorInfo("F16", (vocab, hidden)),
        **_norm(FINAL_NORM, hidden),
        **_weight(LM_HEAD, vocab, hidden, bits),
    }
    for layer in range(geometry.num_layers):
        prefix = f"layers.{layer}."
        tensors |= _norm(prefix + "norm", hidden)
        tensors |= _weight(prefix + "w_in", 3 * attention + geometry.inner_size, hidden, bits)
        tensors |= _weight(prefix + "w_out", hidden, attention + geometry.inner_size, bits)
    return tensors


def _norm(name: str, hidden: int) -> dict[str, TensorInfo]:
    return {f"{name}.{part}": TensorInfo("F32", (hidden,)) for part in ("weight", "bias")}


def _weight(name: str, outputs: int, inputs: int, bits: int) -> dict[str, TensorInfo]:
    bias = {f"{name}.bias": TensorInfo("F32", (outputs,))}
    if bits == 8:
        return bias | {
            f"{name}.quantized": TensorInfo("I8", (outputs, inputs)),
            f"{name}.scale": TensorInfo("F32", (outputs,)),
        }
    return bias | {
        f"{name}.packed": TensorInfo("U8", (outputs, -(-inputs // 2))),
        f"{name}.scale": TensorInfo("F16", (outputs, -(-inputs // INT4_GROUP))),
    }
