"""Where a model's files are and what they hold, checked before anything heavy is imported.

Every problem is one BackendLoadError of one line: `serve` prints it and exits with code 2.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjet.service.embedded import EMBEDDED_NAME, embedded_path
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.hub import download_snapshot
from gptjet.service.models.safetensors_header import TensorInfo, read_header

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
QUANT_METHOD = "gptjet"
"""In config.json's quantization_config, of a folder that `gptjet quantize` wrote."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Constant tables that older versions of transformers saved with the weights. They hold no
# parameter: causal masks of GPT-J, GPT-2, GPT-Neo(X) and CodeGen, and rotary tables.
_BUFFER = re.compile(
    r"(^|\.)(attn\.(bias|masked_bias|causal_mask)|attn\.attention\.(bias|masked_bias)"
    r"|attention\.(bias|masked_bias)|crossattention\.bias|embed_positions|rotary_emb\.inv_freq)$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's folder, found and checked as far as files and headers go.

    name          what to call it: "embedded", the folder's name, or the hub name
    config        config.json; `generation_config` likewise, empty where there is none
    architecture  the class named in config.json, "" where it names none
    weight_files  in the order of their names; pickles only where they were allowed
    tensors       name -> dtype and shape over all files; empty for pickles, which loading opens
    total_bytes   of the weight files on disk
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    model_type: str
    architecture: str
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    total_bytes: int

    @property
    def is_pickle(self) -> bool:
        """Whether the weights are pickles."""
        return self.weight_files[0].suffix == ".bin"

    @property
    def is_quantized(self) -> bool:
        """Whether `gptjet quantize` wrote it."""
        recipe = self.config.get("quantization_config")
        return isinstance(recipe, Mapping) and recipe.get("quant_method") == QUANT_METHOD

    @property
    def num_parameters(self) -> int:
        """Parameters in the files, by their headers; 0 for pickles. Stored once, counted once."""
        return sum(
            info.num_elements
            for name, info in self.tensors.items()
            if not is_ignorable_buffer(name)
        )


def is_ignorable_buffer(name: str) -> bool:
    """Whether a tensor the model does not have is one of the constants old checkpoints carry."""
    return _BUFFER.search(name) is not None


def resolve_checkpoint(
    model: str, *, allow_pickle: bool = False, local_files_only: bool | None = None
) -> Checkpoint:
    """Find `model` and check its files.

    `model` is "embedded", a folder (nothing outside it is looked at, the network least of all), or
    a name on the Hugging Face hub, which is downloaded unless `local_files_only` restricts it to
    the hub's cache on this machine. Raises BackendLoadError.
    """
    if model == EMBEDDED_NAME:
        return _read_folder(_embedded_folder(), EMBEDDED_NAME, allow_pickle)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _read_folder(folder, folder.resolve().name, allow_pickle)
    if folder.exists():
        raise BackendLoadError(f"{folder} is a file: give the folder that holds config.json")
    if not _HUB_NAME.fullmatch(model):
        raise BackendLoadError(f"there is no folder {folder}")
    downloaded = download_snapshot(
        model, allow_pickle=allow_pickle, local_files_only=bool(local_files_only)
    )
    has_safetensors = any((downloaded / f).is_file() for f in (SAFETENSORS_FILE, SAFETENSORS_INDEX))
    if not has_safetensors and not allow_pickle:
        raise BackendLoadError(
            f"{model} has no safetensors weights on the hub; pickles, which can run code when they "
            f"are opened, are fetched with --allow-pickle"
        )
    return _read_folder(downloaded, model, allow_pickle)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises BackendLoadError naming the file and what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BackendLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8
        raise BackendLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackendLoadError(
            f"{path} must hold a JSON object, it holds a {type(content).__name__}"
        )
    return content


def _embedded_folder() -> Path:
    try:
        return embedded_path()
    except OSError as error:
        raise BackendLoadError(f"the embedded checkpoint is not here: {error}") from error


def _read_folder(folder: Path, name: str, allow_pickle: bool) -> Checkpoint:
    if not (folder / "config.json").is_file():
        what = "is empty" if not any(folder.iterdir()) else "holds no config.json"
        raise BackendLoadError(f"{folder} {what}: a checkpoint needs config.json and its weights")
    config = read_json(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise BackendLoadError(f"{folder / 'config.json'} names no model_type, so no architecture")
    generation_file = folder / "generation_config.json"
    architectures = config.get("architectures") or [""]
    weight_files = _find_weights(folder, allow_pickle)
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files:
        if path.suffix == ".bin":
            _check_pickle(path)
        else:
            tensors.update(read_header(path))
    _check_index_is_kept(folder, weight_files, tensors)
    return Checkpoint(
        path=folder,
        name=name,
        config=config,
        generation_config=read_json(generation_file) if generation_file.is_file() else {},
        model_type=model_type,
        architecture=str(architectures[0]) if isinstance(architectures, list) else "",
        weight_files=weight_files,
        tensors=tensors,
        total_bytes=sum(path.stat().st_size for path in weight_files),
    )


def _find_weights(folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    """Weight files, in transformers' own order of preference."""
    if (folder / SAFETENSORS_FILE).is_file():
        return (folder / SAFETENSORS_FILE,)
    if (folder / SAFETENSORS_INDEX).is_file():
        return _shards(folder, SAFETENSORS_INDEX, ".safetensors")
    has_pickle = (folder / PICKLE_FILE).is_file() or (folder / PICKLE_INDEX).is_file()
    if has_pickle and not allow_pickle:
        raise BackendLoadError(
            f"{folder} holds only pickle weights ({PICKLE_FILE}), and a pickle can run code when "
            f"it is opened: convert it to safetensors, or trust it with --allow-pickle"
        )
    if (folder / PICKLE_FILE).is_file():
        return (folder / PICKLE_FILE,)
    if has_pickle:
        return _shards(folder, PICKLE_INDEX, ".bin")
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in {".safetensors", ".bin", ".pt", ".gguf", ".h5", ".msgpack"}
    )
    found = f" (found {', '.join(others[:3])})" if others else ""
    raise BackendLoadError(
        f"{folder} holds no weights: neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX}{found}"
    )


def _shards(folder: Path, index_name: str, suffix: str) -> tuple[Path, ...]:
    index = folder / index_name
    names = sorted(set(_weight_map(index).values()))
    # A name with a separator would make an index file reach outside the folder.
    strange = [name for name in names if Path(name).name != name or not name.endswith(suffix)]
    if strange:
        raise BackendLoadError(f"{index} names {strange[0]!r}, which is no shard of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BackendLoadError(
            f"{folder} lacks {len(missing)} of {len(names)} shards that {index_name} names: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return tuple(folder / name for name in names)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise BackendLoadError(f"{index} has no weight_map of tensor names to shards")
    return weight_map


def _check_index_is_kept(
    folder: Path, weight_files: tuple[Path, ...], tensors: Mapping[str, TensorInfo]
) -> None:
    """Every tensor the index promises is in some shard."""
    index = folder / SAFETENSORS_INDEX
    if not tensors or weight_files == (folder / SAFETENSORS_FILE,):
        return
    missing = [name for name in _weight_map(index) if name not in tensors]
    if missing:
        raise BackendLoadError(
            f"{index} names {len(missing)} tensors that no shard holds: {', '.join(missing[:3])}"
        )


def _check_pickle(path: Path) -> None:
    # torch.save writes a zip archive, whose directory is at its end: a cut file has none.
    if not zipfile.is_zipfile(path):
        raise BackendLoadError(
            f"{path} is truncated or not a PyTorch file: {path.stat().st_size} bytes without a "
            f"zip directory"
        )
