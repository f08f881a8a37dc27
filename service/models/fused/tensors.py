"""The tensors of a checkpoint's files, mapped a few at a time and given back at once."""

from __future__ import annotations

import contextlib
import pickle
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.architecture import one_line
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.safetensors_header import TensorInfo, read_header

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


class TensorFiles:
    """Which file holds which tensor, and a way to look at a few of them.

    `prefix` is put before names that lack it and are not in `unprefixed` ("transformer." before
    what a bare GPTJModel saved). `infos` has dtype and shape of every tensor by that name.
    Raises BackendLoadError where a file cannot be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, prefix: str = "", unprefixed: tuple[str, ...] = ()
    ) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in checkpoint.weight_files:
            for stored, info in _infos(path).items():
                is_full = stored.startswith((prefix, *unprefixed))
                name = stored if is_full else prefix + stored
                self.infos[name] = info
                self._places[name] = (path, stored)

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[Mapping[str, torch.Tensor]]:
        """The tensors by name, as pages of their files: copy what is kept, and keep no view.

        The files are mapped here and unmapped on leaving, so that the pages that were read do not
        count as this process's memory any longer.
        """
        by_file: dict[Path, dict[str, str]] = defaultdict(dict)
        for name in names:
            path, stored = self._places[name]
            by_file[path][name] = stored
        tensors: dict[str, torch.Tensor] = {}
        for path, wanted in by_file.items():
            tensors.update(_read(path, wanted))
        try:
            yield tensors
        finally:
            tensors.clear()


def _infos(path: Path) -> dict[str, TensorInfo]:
    if path.suffix != ".bin":
        return read_header(path)
    return {
        name: TensorInfo(_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in _load_pickle(path).items()
    }


def _read(path: Path, wanted: Mapping[str, str]) -> dict[str, torch.Tensor]:
    if path.suffix == ".bin":
        held = _load_pickle(path)
        return {name: held[stored] for name, stored in wanted.items()}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(stored) for name, stored in wanted.items()}
    except (OSError, SafetensorError) as error:
        raise BackendLoadError(f"{path} cannot be read: {one_line(error)}") from error


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, mapped: only their descriptions are read here."""
    try:
        held: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise BackendLoadError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(held, Mapping):
        raise BackendLoadError(f"{path} holds a {type(held).__name__}, not tensors by name")
    strange = [str(name) for name, value in held.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise BackendLoadError(f"{path} holds {strange[0]}, which is no tensor")
    return {str(name): tensor for name, tensor in held.items()}
