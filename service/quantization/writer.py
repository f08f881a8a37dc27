"""A quantised checkpoint's folder: shards as they fill, then everything at once under its name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import (
    QUANT_METHOD,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    Checkpoint,
)
from gptjet.service.models.fused import recipe as recipes
from gptjet.service.models.fused.recipe import Recipe

if TYPE_CHECKING:
    import torch

MAX_SHARD_BYTES = 4_000_000_000
# What a served model needs beside its weights, and the terms it comes under.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_COPIED_PATTERNS = ("LICENSE*", "NOTICE*")


class CheckpointWriter:
    """Collects tensors into shards in a temporary folder."""

    def __init__(self, folder: Path, recipe: Recipe, max_shard_bytes: int) -> None:
        self._folder = folder
        self._recipe = recipe
        self._max_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors that belong together; a shard that they would overfill is written first."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._write_shard()
        # safetensors refuses tensors that share memory, which a view of another one does.
        self._pending |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._pending_bytes += size
        self._total_bytes += size

    def finish(self, checkpoint: Checkpoint) -> None:
        """Write the last shard, the index, config.json and what is copied from `checkpoint`."""
        self._write_shard()
        names = self._name_shards()
        if len(names) > 1:
            weight_map = {
                tensor: name
                for name, (_, held) in zip(names, self._shards, strict=True)
                for tensor in held
            }
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self._folder / SAFETENSORS_INDEX, index)
        checksums = {name: recipes.file_sha256(self._folder / name) for name in names}
        config = dict(checkpoint.config)
        config[recipes.CONFIG_KEY] = self._recipe.as_dict() | {"sha256": checksums}
        _write_json(self._folder / "config.json", config)
        for name in names:  # safetensors writes them for the owner alone
            shutil.copymode(self._folder / "config.json", self._folder / name)
        extra = [path for pattern in _COPIED_PATTERNS for path in checkpoint.path.glob(pattern)]
        for path in (*(checkpoint.path / name for name in _COPIED), *extra):
            if path.is_file():
                (self._folder / path.name).write_bytes(_read_source(path))

    def _write_shard(self) -> None:
        if not self._pending:
            return
        path = self._folder / f"shard-{len(self._shards)}"
        metadata = {"format": "pt", recipes.METADATA_KEY: json.dumps(self._recipe.as_dict())}
        try:
            save_file(self._pending, path, metadata=metadata)
        except SafetensorError as error:  # what safetensors makes of a full disk, too
            raise OSError(str(error)) from error
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def _name_shards(self) -> list[str]:
        """Their final names, which say how many there are."""
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = [SAFETENSORS_FILE]
        for name, (path, _) in zip(names, self._shards, strict=True):
            path.rename(self._folder / name)
        return names


def check_output(checkpoint: Checkpoint, output: Path, *, force: bool) -> None:
    """Refuse a folder that would be lost: raises BackendLoadError.

    `force` replaces what an earlier run wrote, and nothing else: no source, no other folder.
    """
    source, target = checkpoint.path.resolve(), output.resolve()
    if source == target:
        raise BackendLoadError(f"{output} is the checkpoint itself: give another folder")
    if source.is_relative_to(target):
        raise BackendLoadError(
            f"{output} holds the checkpoint {checkpoint.path}: give another folder"
        )
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise BackendLoadError(f"{output} exists and is no folder")
    if not any(output.iterdir()):
        return
    if not _is_ours(output):
        raise BackendLoadError(
            f"{output} exists and was not written by `gptjet quantize`: give another folder"
        )
    if not force:
        raise BackendLoadError(f"{output} exists: give --force to replace it")


@contextlib.contextmanager
def new_folder(output: Path, *, check: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its name once the block is through.

    `check` is called right before that, and refuses by raising what has come to lie at `output`
    meanwhile. Whatever ends it earlier, the temporary folder goes and `output` stays what it was.
    Raises BackendLoadError where the folder cannot be made.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise BackendLoadError(f"{output} cannot be written: {error.strerror or error}") from error
    old = temporary / "old"
    try:
        content = temporary / "new"
        content.mkdir()  # with the permissions that a new folder gets, which mkdtemp's has not
        yield content
        check()
        _swap(content, output, old)
    except OSError as error:
        kept = f"; what it held is in {old}" if _is_homeless(old, output) else ""
        raise BackendLoadError(
            f"{output} cannot be written: {error.strerror or error}{kept}"
        ) from error
    finally:
        # A second interrupt can end the restoring; then the only copy lies in there.
        if not _is_homeless(old, output):
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(content: Path, output: Path, old: Path) -> None:
    """Give `content` the name of `output`, which becomes `old`; or leave `output` what it was."""
    try:
        if output.exists():
            output.rename(old)
        content.rename(output)
    except BaseException:  # Ctrl-C between the two, as well
        if _is_homeless(old, output):
            old.rename(output)
        raise


def _is_homeless(old: Path, output: Path) -> bool:
    """Whether what was `output` lies at `old` only."""
    return os.path.lexists(old) and not os.path.lexists(output)


def _read_source(path: Path) -> bytes:
    """A file of the source, which is no fault of the output's where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BackendLoadError(f"{path} cannot be read: {error.strerror or error}") from error


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config[recipes.CONFIG_KEY]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
