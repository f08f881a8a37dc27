"""A GPT-J-class model packed for the CPU, and its forward pass: one call into C for any rows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator

import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch
from gptjet.kernels.cpu import library as native
from gptjet.kernels.weights import (
    DenseWeight,
    HeadWeights,
    Int8Weight,
    LayerWeights,
    Weight,
)

MAX_THREADS = 256
MAX_INT4_GROUP = 4096
"""Input features in a group whose dot product of 4-bit by 16-bit numbers fits 32 bits."""

INT8_GROUP = 128
"""Input features that share a scale of the activations beside INT8 weights."""

_SLICE_VALUES = 1 << 22
"""Values converted at once while packing, so that no second copy of a weight arises."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class CpuModel:
    """Packed weights and scratch memory in the C library's hands.

    Of one thread at a time. A row's logits do not depend on the rows beside it, on how a prompt is
    cut into passes, or on the number of threads: bit for bit.
    """

    def __init__(self, library: native.Library, geometry: BlockGeometry, handle: int) -> None:
        self._library = library
        self.geometry = geometry
        self._handle: int | None = handle
        self._kv_tail = (geometry.num_heads, BLOCK_SIZE, geometry.head_dim)
        self._batch = native.Batch()
        self._batch_pointer = ctypes.pointer(self._batch)
        self._where = ctypes.c_int32()
        self._where_pointer = ctypes.pointer(self._where)
        self.nbytes = 0
        """Bytes of packed weights."""

    @classmethod
    def pack(
        cls,
        geometry: BlockGeometry,
        head: HeadWeights,
        layers: Iterable[LayerWeights],
        *,
        num_threads: int,
        take: bool = False,
    ) -> CpuModel:
        """Pack the weights, taking one layer at a time from `layers`.

        Dense weights are kept in float32, the embedding in what it comes in. `take` empties each
        matrix once it is packed, so that it is not there twice whoever else still refers to it.
        Raises NativeUnavailableError, ValueError for weights that do not fit the geometry,
        MemoryError.
        """
        _check_geometry(geometry)
        if not 1 <= num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads is {num_threads}; it may be 1 to {MAX_THREADS}")
        library = native.native_library()
        half = head.embedding.dtype is torch.float16
        sizes = native.Geometry(
            geometry.num_layers,
            geometry.hidden_size,
            geometry.num_heads,
            geometry.head_dim,
            geometry.rotary_dim,
            geometry.inner_size,
            geometry.vocab_size,
            geometry.max_context,
            geometry.layer_norm_eps,
            int(half),
            num_threads,
        )
        handle = library.create(ctypes.byref(sizes))
        if not handle:
            raise MemoryError("no memory or threads for the model")
        model = cls(library, geometry, handle)
        try:
            model._set_head(head, half, take)
            count = 0
            for layer in layers:
                if count == geometry.num_layers:
                    raise ValueError(f"there are more than {count} layers")
                model._set_layer(count, layer, take)
                count += 1
                del layer  # it must go before the next one comes
            if count < geometry.num_layers:
                raise ValueError(f"there are {count} layers of {geometry.num_layers}")
        except BaseException:
            model.close()
            raise
        model.nbytes = library.bytes(handle)
        return model

    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] float32 of the rows asked for; writes the rows' keys and values.

        Raises ValueError, before anything is written, for a batch that does not fit the model.
        """
        tokens, positions, index = batch.token_ids, batch.positions, batch.sequence_index
        tables, rows = batch.block_tables, batch.logits_rows
        _check_vector("token_ids", tokens, None)
        count = tokens.shape[0]
        _check_vector("positions", positions, count)
        _check_vector("sequence_index", index, count)
        _check_vector("logits_rows", rows, None)
        if tables.dim() != 2 or tables.dtype != torch.int32 or not tables.is_contiguous():
            raise ValueError("block_tables must be contiguous int32 [sequences, blocks]")
        shape = kv_cache.shape
        if (
            kv_cache.dtype != torch.float32
            or len(shape) != 6
            or shape[0] != self.geometry.num_layers
            or shape[1] != 2
            or tuple(shape[3:]) != self._kv_tail
            or not kv_cache.is_contiguous()
        ):
            raise ValueError(
                f"kv_cache must be contiguous float32 [{self.geometry.num_layers}, 2, blocks, "
                f"{', '.join(map(str, self._kv_tail))}], not {kv_cache.dtype} {list(shape)}"
            )
        if any(
            tensor.device.type != "cpu"
            for tensor in (tokens, positions, index, tables, rows, kv_cache)
        ):
            raise ValueError("the batch and kv_cache must be on the CPU")
        logits = torch.empty(rows.shape[0], self.geometry.vocab_size)
        call = self._batch
        call.token_ids = tokens.data_ptr()
        call.positions = positions.data_ptr()
        call.sequence_index = index.data_ptr()
        call.block_tables = tables.data_ptr()
        call.logits_rows = rows.data_ptr()
        call.tokens = count
        call.sequences, call.table_width = tables.shape
        call.logits = rows.shape[0]
        call.kv_cache = kv_cache.data_ptr()
        call.num_blocks = shape[2]
        call.out = logits.data_ptr()
        result = self._library.forward(self._open(), self._batch_pointer, self._where_pointer)
        if result != native.OK:
            self._refuse(result, self._where.value, batch, shape[2])
        return logits

    def close(self) -> None:
        """Free the memory and end the threads; the model cannot be used any more."""
        if self._handle is not None:
            self._library.destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def _open(self) -> int:
        if self._handle is None:
            raise ValueError("the model is closed")
        return self._handle

    def _refuse(self, result: int, where: int, batch: ForwardBatch, num_blocks: int) -> None:
        limits = self.geometry
        if result == native.NO_MEMORY:
            raise MemoryError("no memory for the pass")
        if result == native.BAD_TOKEN:
            value = int(batch.token_ids[where])
            message = f"token_ids[{where}] is {value}; the vocabulary has {limits.vocab_size}"
        elif result == native.BAD_SEQUENCE:
            value = int(batch.sequence_index[where])
            message = (
                f"sequence_index[{where}] is {value}; block_tables has "
                f"{batch.block_tables.shape[0]} rows"
            )
        elif result == native.BAD_POSITION:
            value = int(batch.positions[where])
            message = (
                f"positions[{where}] is {value}; the context has {limits.max_context} and "
                f"block_tables reaches {batch.block_tables.shape[1] * BLOCK_SIZE}"
            )
        elif result == native.BAD_ORDER:
            message = f"row {where} does not follow the row before it in its sequence"
        elif result == native.BAD_BLOCK:
            value = int(batch.block_tables.flatten()[where])
            place = divmod(where, batch.block_tables.shape[1])
            message = f"block_tables{list(place)} is {value}; the cache has {num_blocks} blocks"
        else:
            value = int(batch.logits_rows[where])
            message = (
                f"logits_rows[{where}] is {value}; it must be one of "
                f"{batch.token_ids.shape[0]} rows, and none twice"
            )
        raise ValueError(message)

    def _set_head(self, head: HeadWeights, half: bool, take: bool) -> None:
        sizes = self.geometry
        _check_shape("embedding", head.embedding, (sizes.vocab_size, sizes.hidden_size))
        dtype = torch.float16 if half else torch.float32
        for begin, rows in _slices(head.embedding):
            values = rows.to(dtype).contiguous()
            self._library.set_embedding(self._handle, begin, values.shape[0], values.data_ptr())
            del rows, values  # they would hold all of it
        if take and _stored(head.lm_head) is not head.embedding:  # tied: it is read once more
            _empty(head.embedding)
        self._set_norm(-1, head.norm_weight, head.norm_bias)
        self._set_weight(
            "lm_head", 0, native.LM_HEAD, head.lm_head, (sizes.vocab_size, sizes.hidden_size), take
        )
        cosine, sine = rotary_tables(sizes.max_context, sizes.rotary_dim)
        self._library.set_rotary(self._handle, cosine.data_ptr(), sine.data_ptr())

    def _set_layer(self, index: int, layer: LayerWeights, take: bool) -> None:
        sizes = self.geometry
        attention = sizes.num_heads * sizes.head_dim
        self._set_norm(index, layer.norm_weight, layer.norm_bias)
        w_in = (3 * attention + sizes.inner_size, sizes.hidden_size)
        w_out = (sizes.hidden_size, attention + sizes.inner_size)
        self._set_weight(f"layer {index}: w_in", index, native.W_IN, layer.w_in, w_in, take)
        self._set_weight(f"layer {index}: w_out", index, native.W_OUT, layer.w_out, w_out, take)

    def _set_norm(self, layer: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
        name = "final LayerNorm" if layer < 0 else f"layer {layer}: LayerNorm"
        for tensor in (weight, bias):
            _check_shape(name, tensor, (self.geometry.hidden_size,))
        values = [tensor.float().contiguous() for tensor in (weight, bias)]
        self._library.set_norm(self._handle, layer, values[0].data_ptr(), values[1].data_ptr())

    def _set_weight(
        self,
        name: str,
        layer: int,
        which: int,
        weight: Weight,
        shape: tuple[int, int],
        take: bool,
    ) -> None:
        if weight.shape != shape:
            raise ValueError(f"{name} is {list(weight.shape)}, not {list(shape)}")
        if weight.bias is not None:
            _check_shape(f"{name}.bias", weight.bias, shape[:1])
        kind, group = _kind(name, weight)
        bias = None if weight.bias is None else weight.bias.float().contiguous()
        pointer = None if bias is None else bias.data_ptr()
        if self._library.weight_begin(self._handle, layer, which, kind, group, pointer):
            raise MemoryError(f"no memory for {name}")
        if isinstance(weight, DenseWeight):
            for begin, part in _slices(weight.weight):
                self._set_rows(layer, which, begin, part.float().contiguous(), None)
        elif isinstance(weight, Int8Weight):
            scale = weight.scale.float().contiguous()
            self._set_rows(layer, which, 0, weight.quantized.contiguous(), scale)
        else:
            scale = weight.scale.to(torch.float16).contiguous()
            self._set_rows(layer, which, 0, weight.packed.contiguous(), scale)
        if take:
            _empty(_stored(weight))

    def _set_rows(
        self,
        layer: int,
        which: int,
        begin: int,
        values: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> None:
        pointer = None if scale is None else scale.data_ptr()
        self._library.weight_rows(
            self._handle, layer, which, begin, values.shape[0], values.data_ptr(), pointer
        )


def rotary_tables(max_context: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [max_context, rotary_dim], each twice; the sines of even features negated.

    A pair (x, y) turns to (x cos - y sin, y cos + x sin). Angles are in float32, position times
    10000^(-2 i / rotary_dim), as transformers' GPT-J computes them: at position 2,000 another
    rounding of the product would already show.
    """
    if rotary_dim == 0:
        return torch.zeros(0), torch.zeros(0)
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64) / rotary_dim
    frequencies = 1.0 / (10000**exponents)
    angles = torch.outer(torch.arange(max_context).float(), frequencies.float())
    sine = torch.sin(angles)
    cosine = torch.cos(angles).repeat_interleave(2, dim=1)
    return cosine.contiguous(), torch.stack((-sine, sine), dim=2).flatten(1).contiguous()


def _kind(name: str, weight: Weight) -> tuple[int, int]:
    """gj_kind and the group of input features; raises ValueError for dtypes and shapes."""
    if isinstance(weight, DenseWeight):
        if weight.weight.dtype not in _FLOATS:
            raise ValueError(f"{name} is {weight.weight.dtype}, not a float of 32 or 16 bits")
        return native.FP32, 0
    outputs, inputs = weight.shape
    if isinstance(weight, Int8Weight):
        if weight.quantized.dtype != torch.int8:
            raise ValueError(f"{name}.quantized is {weight.quantized.dtype}, not int8")
        _check_shape(f"{name}.scale", weight.scale, (outputs,))
        return native.INT8, INT8_GROUP
    if weight.packed.dtype != torch.uint8:
        raise ValueError(f"{name}.packed is {weight.packed.dtype}, not uint8")
    if not 1 <= weight.group <= MAX_INT4_GROUP:
        raise ValueError(f"{name}.group is {weight.group}; it may be 1 to {MAX_INT4_GROUP}")
    _check_shape(f"{name}.packed", weight.packed, (outputs, -(-inputs // 2)))
    _check_shape(f"{name}.scale", weight.scale, (outputs, -(-inputs // weight.group)))
    return native.INT4, weight.group


def _stored(weight: Weight) -> torch.Tensor:
    """The matrix of a weight, as it is kept."""
    if isinstance(weight, DenseWeight):
        return weight.weight
    return weight.quantized if isinstance(weight, Int8Weight) else weight.packed


def _empty(tensor: torch.Tensor) -> None:
    tensor.data = tensor.new_empty(0)


def _slices(matrix: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of pieces of about _SLICE_VALUES values, in whole panels of 64 rows."""
    step = max(_SLICE_VALUES // matrix.shape[1] // 64, 1) * 64
    for begin in range(0, matrix.shape[0], step):
        yield begin, matrix[begin : begin + step]


def _check_geometry(geometry: BlockGeometry) -> None:
    for name in (
        "num_layers",
        "hidden_size",
        "num_heads",
        "head_dim",
        "inner_size",
        "vocab_size",
        "max_context",
    ):
        if getattr(geometry, name) < 1:
            raise ValueError(f"{name} is {getattr(geometry, name)}; it must be at least 1")
    if geometry.head_dim % 2:
        raise ValueError(f"head_dim is {geometry.head_dim}; rotary pairs need an even one")
    if geometry.rotary_dim % 2 or not 0 <= geometry.rotary_dim <= geometry.head_dim:
        raise ValueError(
            f"rotary_dim is {geometry.rotary_dim}; it must be even and 0 to {geometry.head_dim}"
        )


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device}; the CPU model needs it on the CPU")


def _check_vector(name: str, tensor: torch.Tensor, length: int | None) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 in one dimension")
    if length is not None and tensor.shape[0] != length:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, token_ids {length}")
