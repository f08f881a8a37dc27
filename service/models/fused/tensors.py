"""The tensors of a checkpoint's files, read one at a time into memory of the reader's own.

Files are read and not mapped: the pages of a mapped file count as the process's memory while they
are looked at, beside the copy that is made of them, and a file that is cut short meanwhile would
end the process with SIGBUS where reading it fails with an error.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import pickle
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.models.checkpoint import Checkpoint
from gptjet.service.models.messages import one_line
from gptjet.service.models.safetensors_header import TensorInfo, read_layout

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
_OWN_PAGES_BYTES = 1 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFiles:
    """Which file holds which tensor, and a way to read a few of them.

    `prefix` is put before names that lack it and are not in `unprefixed` ("transformer." before
    what a bare GPTJModel saved). `infos` has dtype and shape of every tensor by that name.
    Raises BackendLoadError where a file cannot be read.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, prefix: str = "", unprefixed: tuple[str, ...] = ()
    ) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        for path in checkpoint.weight_files:
            for place in _places(path):
                is_full = place.stored.startswith((prefix, *unprefixed))
                name = place.stored if is_full else prefix + place.stored
                self.infos[name] = place.info
                self._places[name] = place

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[HeldTensors]:
        """The tensors by name, each read when it is asked for."""
        with contextlib.ExitStack() as stack:
            yield HeldTensors({name: self._places[name] for name in names}, stack)


class HeldTensors(Mapping[str, torch.Tensor]):
    """Tensors of open files. Each look reads one anew, and what it returns is the caller's own.

    Raises BackendLoadError where a file has become shorter or cannot be read.
    """

    def __init__(self, places: Mapping[str, _Place], stack: contextlib.ExitStack) -> None:
        self._places = places
        self._stack = stack
        self._files: dict[Path, FileIO] = {}
        self._pickles: dict[Path, Mapping[str, torch.Tensor]] = {}
        stack.callback(self._pickles.clear)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._places[name].info.shape
        if not shape:
            return self._read(self._places[name], 0, 1, ())
        return self.rows(name, 0, shape[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of one, which are all of it that is read."""
        place = self._places[name]
        row = place.info.shape[1:]
        elements = math.prod(row)
        return self._read(place, start * elements, (stop - start) * elements, (stop - start, *row))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, place: _Place, first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        if place.offset is None:
            if place.path not in self._pickles:
                self._pickles[place.path] = _load_pickle(place.path)
            mapped = self._pickles[place.path][place.stored]
            return mapped.flatten()[first : first + count].reshape(shape).clone()
        dtype = _DTYPES.get(place.info.dtype)
        if dtype is None:
            raise BackendLoadError(
                f"{place.path}: {place.stored} is stored as {place.info.dtype}, which is no weight"
            )
        tensor = _allocate(count, dtype)
        if count:
            at = place.offset + first * dtype.itemsize
            self._fill(place, at, tensor.view(torch.uint8).numpy().data)
        return tensor.resize_(shape)  # not a view, which would hold the memory through its base

    def _fill(self, place: _Place, offset: int, target: memoryview) -> None:
        try:
            if place.path not in self._files:
                file = place.path.open("rb", buffering=0)
                self._files[place.path] = self._stack.enter_context(file)
            file = self._files[place.path]
            file.seek(offset)
            while target:
                count = file.readinto(target)
                if not count:
                    raise BackendLoadError(
                        f"{place.path} cannot be read: it has become shorter than its header says"
                    )
                target = target[count:]
        except OSError as error:
            raise BackendLoadError(f"{place.path} cannot be read: {one_line(error)}") from error


def _allocate(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Large ones in pages of their own, which are the system's again at once when they are freed.

    malloc would keep some tens of MiB of them for itself.
    """
    size = count * dtype.itemsize
    if size < _OWN_PAGES_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(count, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count)


class _Place:
    """Where a tensor is: `stored` is its name there, `offset` its first byte, None in a pickle."""

    __slots__ = ("info", "offset", "path", "stored")

    def __init__(self, path: Path, stored: str, info: TensorInfo, offset: int | None) -> None:
        self.path = path
        self.stored = stored
        self.info = info
        self.offset = offset


def _places(path: Path) -> Iterator[_Place]:
    if path.suffix != ".bin":
        for name, (info, offset) in read_layout(path).items():
            yield _Place(path, name, info, offset)
        return
    for name, tensor in _load_pickle(path).items():
        dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        yield _Place(path, name, TensorInfo(dtype, tuple(tensor.shape)), None)


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
