"""What a safetensors file says it holds, read from its first bytes and checked against its size.

The format (github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON
object of name -> {dtype, shape, data_offsets}, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptjet.service.engine.errors import BackendLoadError

if TYPE_CHECKING:
    from pathlib import Path

# Of one element, in bytes. Types below a byte are packed and belong to quantised checkpoints.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its dtype as safetensors spells it ("F32") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of the file by name, in the file's order. Raises BackendLoadError: read_layout."""
    return {name: info for name, (info, _) in read_layout(path).items()}


def read_layout(path: Path) -> dict[str, tuple[TensorInfo, int]]:
    """The same with the byte of the file at which each tensor begins. No tensor is read.

    Raises BackendLoadError in one line when the file cannot be opened, is cut short, is a Git LFS
    pointer, or its header is no header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(max(8, len(_LFS_MAGIC)))
            if prefix.startswith(_LFS_MAGIC):
                raise BackendLoadError(
                    f"{path} is a Git LFS pointer, not weights: run `git lfs pull` in its folder"
                )
            if len(prefix) < 8:
                raise BackendLoadError(
                    f"{path} is truncated: {size} bytes, a safetensors file has 8 or more"
                )
            (header_bytes,) = struct.unpack("<Q", prefix[:8])
            if header_bytes > _MAX_HEADER_BYTES:
                raise BackendLoadError(
                    f"{path} has a corrupt header: it claims {header_bytes} bytes of header, the "
                    f"format allows {_MAX_HEADER_BYTES}"
                )
            if 8 + header_bytes > size:
                raise BackendLoadError(
                    f"{path} is truncated: the header alone takes {8 + header_bytes} bytes, the "
                    f"file has {size}"
                )
            file.seek(8)
            raw = file.read(header_bytes)
    except OSError as error:
        raise BackendLoadError(f"{path} cannot be read: {error.strerror or error}") from error
    tensors, data_bytes = _parse(path, raw)
    expected = 8 + header_bytes + data_bytes
    if size < expected:
        raise BackendLoadError(
            f"{path} is truncated: its header describes {expected} bytes, the file has {size}"
        )
    if size > expected:
        raise BackendLoadError(
            f"{path} is corrupt: its header describes {expected} bytes, the file has {size}"
        )
    return {name: (info, 8 + header_bytes + begin) for name, (info, begin) in tensors.items()}


def _parse(path: Path, raw: bytes) -> tuple[dict[str, tuple[TensorInfo, int]], int]:
    """The tensors with where they begin in the data, and the bytes of data in all."""
    try:
        header: Any = json.loads(raw)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        header.pop("__metadata__", None)
        tensors: dict[str, tuple[TensorInfo, int]] = {}
        spans: list[tuple[int, int]] = []
        for name, entry in header.items():
            info, span = _parse_entry(name, entry)
            tensors[name] = info, span[0]
            spans.append(span)
        end_of_last = 0
        for begin, end in sorted(spans):
            if begin != end_of_last:
                raise ValueError(f"a gap or an overlap at byte {end_of_last} of the data")
            end_of_last = end
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise BackendLoadError(f"{path} has a corrupt header: {detail}") from error
    return tensors, end_of_last


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    info = TensorInfo(str(entry["dtype"]), tuple(int(extent) for extent in entry["shape"]))
    begin, end = (int(offset) for offset in entry["data_offsets"])
    element_bytes = DTYPE_BYTES.get(info.dtype)
    if min(begin, end - begin, *info.shape, 0) < 0:
        raise ValueError(f"{name} has a negative size")
    if element_bytes is not None and end - begin != info.num_elements * element_bytes:
        raise ValueError(
            f"{name} is {info.dtype} {list(info.shape)} and cannot take {end - begin} bytes"
        )
    return info, (begin, end)
