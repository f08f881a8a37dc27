"""The compiled library as ctypes sees it: its functions and structures."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from gptjet.kernels.cpu.build import NativeUnavailableError, chosen_isa, library_path

# gj_kind, the numbers of a layer's weights, and the results of gj_forward, as in native/*.h.
FP32, INT8, INT4 = range(3)
W_IN, W_OUT, LM_HEAD = range(3)
(
    OK,
    NO_MEMORY,
    BAD_TOKEN,
    BAD_SEQUENCE,
    BAD_POSITION,
    BAD_ORDER,
    BAD_BLOCK,
    BAD_LOGITS_ROW,
) = range(8)


class Geometry(Structure):
    """gj_geometry."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                "num_layers",
                "hidden_size",
                "num_heads",
                "head_dim",
                "rotary_dim",
                "inner_size",
                "vocab_size",
                "max_context",
            )
        ),
        ("layer_norm_eps", c_float),
        ("half_embedding", c_int32),
        ("num_threads", c_int32),
    )


class Batch(Structure):
    """gj_batch: pointers to the tensors of a ForwardBatch and their sizes."""

    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "token_ids",
                "positions",
                "sequence_index",
                "block_tables",
                "logits_rows",
            )
        ),
        *((name, c_int32) for name in ("tokens", "sequences", "table_width", "logits")),
        ("kv_cache", c_void_p),
        ("num_blocks", c_int64),
        ("out", c_void_p),
    )


class Library:
    """The functions of native/model.h, typed. path: the file that was loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            native = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(f"cannot load {path}: {error}") from error
        self.create = native.gj_create
        self.create.argtypes = (POINTER(Geometry),)
        self.create.restype = c_void_p
        self.destroy = native.gj_destroy
        self.destroy.argtypes = (c_void_p,)
        self.destroy.restype = None
        self.weight_begin = native.gj_weight_begin
        self.weight_begin.argtypes = (c_void_p, c_int, c_int, c_int, c_int, c_void_p)
        self.weight_begin.restype = c_int
        self.weight_rows = native.gj_weight_rows
        self.weight_rows.argtypes = (c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p)
        self.weight_rows.restype = None
        self.set_norm = native.gj_set_norm
        self.set_norm.argtypes = (c_void_p, c_int, c_void_p, c_void_p)
        self.set_norm.restype = None
        self.set_embedding = native.gj_set_embedding
        self.set_embedding.argtypes = (c_void_p, c_int, c_int, c_void_p)
        self.set_embedding.restype = None
        self.set_rotary = native.gj_set_rotary
        self.set_rotary.argtypes = (c_void_p, c_void_p, c_void_p)
        self.set_rotary.restype = None
        self.bytes = native.gj_bytes
        self.bytes.argtypes = (c_void_p,)
        self.bytes.restype = c_uint64
        self.measure_read = native.gj_measure_read
        self.measure_read.argtypes = (c_int, c_uint64, c_int, c_int, POINTER(c_double))
        self.measure_read.restype = c_int
        self.forward = native.gj_forward
        self.forward.argtypes = (c_void_p, POINTER(Batch), POINTER(c_int32))
        self.forward.restype = c_int


_loaded: dict[str, Library] = {}


def native_library() -> Library:
    """The library for this processor, compiled on first use and then read from the cache.

    Raises NativeUnavailableError in one line: no compiler, it failed, or the platform has none.
    """
    isa = chosen_isa()
    if isa not in _loaded:
        _loaded[isa] = Library(library_path())
    return _loaded[isa]
