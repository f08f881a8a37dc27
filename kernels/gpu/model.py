"""A GPT-J-class model on an NVIDIA card: Triton kernels for few rows, cuBLAS and SDPA for many.

A pass goes one of two ways.

    rows      a token or a few of each sequence (decoding, drafts): at most `max_rows` rows, padded
              up to a bucket, over buffers that never move, launched kernel by kernel or replayed as
              a CUDA graph; its weight passes read the weights once for eight rows (routes)
    prefill   everything else: prompts and their chunks

The residual stream is float32, everything else float16; kernels compute in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptjet.kernels import reference
from gptjet.kernels.batch import BLOCK_SIZE, ForwardBatch
from gptjet.kernels.gpu import graphs
from gptjet.kernels.gpu.buffers import (
    CpuTransfers,
    CudaTransfers,
    IdReader,
    RowBuffers,
    RowInputs,
    SampledIds,
    Transfers,
)
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS, Workspace, align_rows, capability_of
from gptjet.kernels.gpu.graphs import BucketedPass, CaptureError, Recorder, bucket_for, row_buckets
from gptjet.kernels.gpu.matmul import Matmul
from gptjet.kernels.gpu.prefill_attention import prefill_attention, spans_of
from gptjet.kernels.gpu.routes import max_gemv_rows
from gptjet.kernels.weights import DenseWeight, Int8Weight

if TYPE_CHECKING:
    from gptjet.kernels.batch import BlockGeometry, SamplingBatch
    from gptjet.kernels.gpu.operations import Operations
    from gptjet.kernels.weights import HeadWeights, LayerWeights, Weight

# (draws, filters) of a step: each is a graph of its own, of the launches that it needs.
_SAMPLING_KINDS = ((False, False), (True, False), (True, True))

# Of the largest logit: some roundings of float16.
_REPLAY_TOLERANCE = 2.0**-7


class GpuModel:
    """Weights on one device, and the two ways through them. Of one thread at a time."""

    def __init__(
        self,
        geometry: BlockGeometry,
        head: HeadWeights,
        layers: Iterable[LayerWeights],
        operations: Operations,
        *,
        max_rows: int,
    ) -> None:
        """Take weights that are on their device: DenseWeight in float16, Int8Weight, Int4Weight.

        max_rows  of a row pass: the most sequences that decode together

        Raises ValueError for another number of layers, and for weights of another dtype.
        """
        self.geometry = geometry
        self.max_rows = max(max_rows, MAX_ROWS)
        self.buckets = row_buckets(self.max_rows)
        self._operations = operations
        head = replace(head, lm_head=align_rows(head.lm_head))
        self._head: HeadWeights | None = head
        self._layers = [
            replace(layer, w_in=align_rows(layer.w_in), w_out=align_rows(layer.w_out))
            for layer in layers
        ]
        if len(self._layers) != geometry.num_layers:
            raise ValueError(f"{len(self._layers)} layers given, {geometry.num_layers} expected")
        self.device = head.embedding.device
        weights = [weight for _, weight in self._passes()]
        for weight in weights:
            _check_weight(weight)
        capability = capability_of(self.device)
        self._max_gemv_rows = min(max_gemv_rows(weight, capability) for weight in weights)
        self._matmul = Matmul(operations, weights, self.device)
        self._cos, self._sin = reference.rotary_tables(
            geometry.max_context, geometry.rotary_dim, self.device
        )
        transfers: Transfers = CpuTransfers()
        if self.device.type == "cuda":
            transfers = CudaTransfers(self.device)
        self._inputs = RowBuffers(self.max_rows, _table_width(geometry), self.device, transfers)
        self._views: dict[int, RowInputs] = {}
        self._buffers = _Buffers(geometry, self.max_rows, self.device)
        self._attention_workspace = torch.empty(
            operations.attention_workspace(
                self.max_rows,
                geometry.num_heads,
                geometry.head_dim,
                _table_width(geometry),
                capability,
            ),
            device=self.device,
        )
        self._workspace = Workspace.for_weights(self.device, self._passes(), MAX_ROWS)
        self._sampling_memory = operations.sampling_memory(
            self.max_rows, geometry.vocab_size, self.device
        )
        self._ids = IdReader(self.max_rows, transfers)
        self._logits_pass = BucketedPass(self._launch_logits)
        self._sampling_passes = {
            kind: BucketedPass(functools.partial(self._launch_sampling, kind))
            for kind in _SAMPLING_KINDS
        }
        # The KV cache that the next launch writes to, and the one that graphs were recorded over.
        self._kv_cache: torch.Tensor | None = None
        self._recorded_cache: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and buffers; a tensor that two weights share counts once."""
        if self._head is None:
            return 0
        tensors = [self._head.embedding, self._head.norm_weight, self._head.norm_bias]
        tensors += [self._cos, self._sin, *_tensors_of(self._head.lm_head)]
        for layer in self._layers:
            tensors += [layer.norm_weight, layer.norm_bias]
            tensors += [*_tensors_of(layer.w_in), *_tensors_of(layer.w_out)]
        by_storage = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
        buffers = self._matmul.nbytes + self._buffers.nbytes + self._attention_workspace.nbytes
        buffers += _nbytes(self._sampling_memory)
        buffers += self._workspace.partials.nbytes + self._workspace.arrivals.nbytes
        return sum(by_storage.values()) + buffers

    def reserved_bytes(self, max_tokens: int, *, graphs_wanted: bool) -> int:
        """Memory to leave free beside the KV cache: prefills of `max_tokens` tokens, graphs."""
        sizes = self.geometry
        width = sizes.num_heads * sizes.head_dim
        # projected; attended, gelu(inner) and both side by side; the residual, its norm and sum;
        # the queries; and one sequence's gathered keys and values, twice.
        per_token = 2 * (3 * width + sizes.inner_size) + 2 * 2 * (width + sizes.inner_size)
        per_token += (3 * 4 + 2 * 2) * sizes.hidden_size + 2 * width
        gathered = 2 * 2 * 2 * width * sizes.max_context
        # The pass of each bucket, and its sampling, in three kinds of some launches each.
        num_graphs = 2 * len(self.buckets)
        recorded = graphs.reserved_bytes(num_graphs) if graphs_wanted else 0
        return per_token * max_tokens + gathered + recorded

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] float32 of the tokens that batch.logits_rows names.

        kv_cache [layers, 2, num_blocks, heads, BLOCK_SIZE, head_dim] float16, or INT8 with its
        scales. Raises ValueError once closed.
        """
        if self._head is None:
            raise ValueError("the model is closed")
        with self._on_device():
            if not self._is_row_pass(batch):
                return self._prefill(batch, kv_cache, self._head)
            logits = self._rows(batch, kv_cache)
            wanted = batch.logits_rows
            # A copy, as the buffer is the next pass's too.
            if np.array_equal(wanted.numpy(), np.arange(logits.shape[0])):
                return logits.clone()
            return logits[wanted.to(self.device).long()]

    @torch.no_grad()
    def forward_and_sample(
        self, batch: ForwardBatch, sampling: SamplingBatch, kv_cache: torch.Tensor
    ) -> SampledIds:
        """Compute one token of each sequence and choose the next, all on the device.

        Returns once everything is launched: the next step may be, with `sampling.sources` naming
        rows of this one, before these ids are read. At most `max_rows` rows. Raises ValueError for
        more, and once closed.
        """
        if self._head is None:
            raise ValueError("the model is closed")
        rows = batch.token_ids.shape[0]
        bucket = bucket_for(rows, self.buckets)
        with self._on_device():
            self._inputs.fill(batch, bucket, sampling)
            self._run(self._logits_pass, bucket, kv_cache)
            kind = (sampling.draws, sampling.filters)
            self._run(self._sampling_passes[kind], bucket, kv_cache)
            return self._ids.start(self._buffers.sampled[:rows])

    def capture(
        self,
        kv_cache: torch.Tensor,
        recorder: Recorder,
        on_bucket: Callable[[int], None] | None = None,
    ) -> None:
        """Record the row pass over this KV cache for every bucket, the largest first.

        The cache's content is written to: nothing may be in use yet. `on_bucket` hears of each
        bucket once it is done. Raises CaptureError, and launches everything as before, where one
        cannot be recorded or does not replay what it does when it is launched.
        """
        self.forget_graphs()
        try:
            for bucket in reversed(self.buckets):
                self._capture(bucket, kv_cache, recorder)
                if on_bucket is not None:
                    on_bucket(bucket)
        except CaptureError:
            self.forget_graphs()
            raise
        self._recorded_cache = kv_cache

    @property
    def recorded_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that are replayed as graphs."""
        return self._logits_pass.recorded

    def forget_graphs(self) -> None:
        """Launch every pass from now on."""
        for steps in (self._logits_pass, *self._sampling_passes.values()):
            steps.forget()
        self._recorded_cache = None

    def close(self) -> None:
        """Give the memory back. Nothing is computed afterwards; twice is fine."""
        self.forget_graphs()
        self._head = None
        self._layers.clear()
        self._views.clear()
        self._kv_cache = None
        self._matmul = Matmul(self._operations, [], self.device)
        self._buffers = _Buffers(self.geometry, 0, self.device)
        self._attention_workspace = self._attention_workspace.new_empty(0)
        self._workspace = Workspace.allocate(self.device, 0, 0)
        self._sampling_memory = None

    # --- rows ---

    def _is_row_pass(self, batch: ForwardBatch) -> bool:
        tokens, sequences = batch.token_ids.shape[0], batch.block_tables.shape[0]
        # One token each of any number of sequences; of more than one each, only as many as a GEMV
        # kernel takes: the attention of a row pass reads a sequence's KV for every row anew.
        return tokens <= self.max_rows and (tokens == sequences or tokens <= MAX_ROWS)

    def _rows(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        rows = batch.token_ids.shape[0]
        bucket = bucket_for(rows, self.buckets)
        self._inputs.fill(batch, bucket)
        self._run(self._logits_pass, bucket, kv_cache)
        return self._buffers.logits[:rows]

    def _run(self, steps: BucketedPass, bucket: int, kv_cache: torch.Tensor) -> None:
        self._kv_cache = kv_cache
        is_recorded = self._recorded_cache is not None and _is_same(self._recorded_cache, kv_cache)
        steps.run(bucket, replay=is_recorded)

    def _launch_logits(self, bucket: int) -> None:
        """Launch everything from the tokens of the first `bucket` rows to their logits."""
        head, kv_cache, run = self._head, self._kv_cache, self._operations
        assert head is not None
        assert kv_cache is not None
        inputs, buffers = self._view(bucket), self._buffers
        residual, projected = buffers.residual[:bucket], buffers.projected[:bucket]
        queries, attended = buffers.queries[:bucket], buffers.attended[:bucket]
        where = (inputs.positions, inputs.sequence_index, inputs.block_tables)
        inner = projected[:, 3 * attended.shape[1] :]
        run.embed(inputs.token_ids, inputs.sources, buffers.sampled, head.embedding, residual)
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            self._first_pass(residual, layer.norm_weight, layer.norm_bias, layer.w_in, projected)
            run.rotary_write_kv(projected, self._cos, self._sin, *where, cache, queries)
            run.paged_attention(
                queries, cache, *where, attended, workspace=self._attention_workspace
            )
            self._second_pass(residual, attended, inner, layer.w_out)
        logits = buffers.logits[:bucket]
        self._first_pass(residual, head.norm_weight, head.norm_bias, head.lm_head, logits)

    def _launch_sampling(self, kind: tuple[bool, bool], bucket: int) -> None:
        """Launch the choice of an id from the logits of the first `bucket` rows."""
        draws, filters = kind
        self._operations.sample(
            self._buffers.logits[:bucket],
            self._view(bucket).sampling,
            self._buffers.sampled[:bucket],
            draws=draws,
            filters=filters,
            workspace=self._sampling_memory,
        )

    def _first_pass(
        self,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        weight: Weight,
        out: torch.Tensor,
    ) -> None:
        eps = self.geometry.layer_norm_eps
        if residual.shape[0] > self._max_gemv_rows:
            self._matmul.layer_norm_linear(residual, norm_weight, norm_bias, eps, weight, out)
            return
        for part in _gemv_parts(residual.shape[0]):
            self._operations.layer_norm_linear(
                residual[part],
                norm_weight,
                norm_bias,
                eps,
                weight,
                out[part],
                workspace=self._workspace,
            )

    def _second_pass(
        self, residual: torch.Tensor, attended: torch.Tensor, inner: torch.Tensor, weight: Weight
    ) -> None:
        if residual.shape[0] > self._max_gemv_rows:
            self._matmul.gelu_linear_residual(residual, attended, inner, weight)
            return
        for part in _gemv_parts(residual.shape[0]):
            self._operations.gelu_linear_residual(
                residual[part], attended[part], inner[part], weight, workspace=self._workspace
            )

    def _passes(self) -> Iterator[tuple[str, Weight]]:
        """The weight passes by the name of their kernel."""
        for layer in self._layers:
            yield "layer_norm_linear", layer.w_in
            yield "gelu_linear_residual", layer.w_out
        if self._head is not None:
            yield "layer_norm_linear", self._head.lm_head

    def _view(self, bucket: int) -> RowInputs:
        if bucket not in self._views:
            self._views[bucket] = self._inputs.views(bucket)
        return self._views[bucket]

    # --- graphs ---

    def _capture(self, bucket: int, kv_cache: torch.Tensor, recorder: Recorder) -> None:
        """Record one bucket, and hold its replay to what the launches compute."""
        with torch.no_grad(), self._on_device():
            self._kv_cache = kv_cache
            self._inputs.fill(_probe(self.geometry, bucket, kv_cache.shape[2]), bucket)
            self._launch_logits(bucket)
            launched = self._buffers.logits[:bucket].clone()
            self._logits_pass.record(bucket, recorder)
            self._buffers.logits.fill_(torch.nan)
            self._logits_pass.run(bucket)
            if not _is_near(self._buffers.logits[:bucket], launched):
                raise CaptureError(f"the graph of {bucket} rows does not replay what was launched")
            likeliest = self._buffers.logits[:bucket].argmax(1)
            for steps in self._sampling_passes.values():
                steps.record(bucket, recorder)
                self._buffers.sampled.fill_(-2)
                steps.run(bucket)  # every row of the probe is greedy
                if not torch.equal(self._buffers.sampled[:bucket].long(), likeliest):
                    raise CaptureError(f"the graph that samples {bucket} rows chose other ids")

    def _on_device(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    # --- prefill ---

    def _prefill(
        self, batch: ForwardBatch, kv_cache: torch.Tensor, head: HeadWeights
    ) -> torch.Tensor:
        run, sizes = self._operations, self.geometry
        tokens = batch.token_ids.shape[0]
        token_ids, positions, index, tables, wanted = self._send(batch)
        spans = spans_of(batch, tables)
        residual = head.embedding[token_ids].float()
        width = sizes.num_heads * sizes.head_dim
        projected = residual.new_empty(tokens, 3 * width + sizes.inner_size, dtype=torch.float16)
        queries = projected.new_empty(tokens, sizes.num_heads, sizes.head_dim)
        attended = projected.new_empty(tokens, width)
        inner = projected[:, 3 * width :]
        eps = sizes.layer_norm_eps
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            self._matmul.layer_norm_linear(
                residual, layer.norm_weight, layer.norm_bias, eps, layer.w_in, projected
            )
            run.rotary_write_kv(
                projected, self._cos, self._sin, positions, index, tables, cache, queries
            )
            prefill_attention(queries, cache, spans, attended)
            self._matmul.gelu_linear_residual(residual, attended, inner, layer.w_out)
        rows = residual[wanted]
        logits = rows.new_empty(rows.shape[0], sizes.vocab_size)
        # Usually the last row of each prompt: few rows are the kernels' again.
        self._first_pass(rows, head.norm_weight, head.norm_bias, head.lm_head, logits)
        return logits

    def _send(self, batch: ForwardBatch) -> list[torch.Tensor]:
        """The arrays of a batch on the device, in one transfer."""
        parts = [
            batch.token_ids,
            batch.positions,
            batch.sequence_index,
            batch.block_tables.flatten(),
            batch.logits_rows,
        ]
        # One buffer, pinned by nobody: torch waits for a copy out of pageable memory, which is
        # nothing beside a prefill, and the runner may then write its arrays anew.
        together = torch.cat(parts).to(self.device)
        sent = list(torch.split(together, [part.numel() for part in parts]))
        sent[3] = sent[3].view(batch.block_tables.shape)
        return sent


class _Buffers:
    """What a row pass writes between its kernels, and what it leaves."""

    def __init__(self, geometry: BlockGeometry, rows: int, device: torch.device) -> None:
        width = geometry.num_heads * geometry.head_dim

        def floats(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            # zeros: what a padding row holds goes through the weights and must be finite
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        half = torch.float16
        self.residual = floats(geometry.hidden_size, dtype=torch.float32)
        self.projected = floats(3 * width + geometry.inner_size, dtype=half)
        self.queries = floats(geometry.num_heads, geometry.head_dim, dtype=half)
        self.attended = floats(width, dtype=half)
        self.logits = floats(geometry.vocab_size, dtype=torch.float32)
        self.sampled = floats(dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


def _probe(geometry: BlockGeometry, bucket: int, num_blocks: int) -> ForwardBatch:
    """First tokens of as many sequences as there are blocks for, which read nobody's KV."""
    rows = min(bucket, num_blocks)
    count = torch.arange(rows, dtype=torch.int32)
    return ForwardBatch(
        token_ids=count % geometry.vocab_size,
        positions=torch.zeros_like(count),
        sequence_index=count,
        block_tables=count[:, None].clone(),
        logits_rows=count,
    )


def _gemv_parts(rows: int) -> list[slice]:
    return [slice(first, min(first + MAX_ROWS, rows)) for first in range(0, rows, MAX_ROWS)]


def _table_width(geometry: BlockGeometry) -> int:
    return -(-geometry.max_context // BLOCK_SIZE)


def _is_near(replayed: torch.Tensor, launched: torch.Tensor) -> bool:
    """Equal but for rounding: on another stream cuBLAS may sum in another order."""
    limit = float(launched.abs().max()) * _REPLAY_TOLERANCE
    return bool(((replayed - launched).abs() <= limit).all())


def _nbytes(memory: object) -> int:
    """Of the tensors of a dataclass; 0 of None."""
    if memory is None:
        return 0
    return sum(getattr(memory, entry.name).nbytes for entry in fields(memory))  # type: ignore[arg-type]


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _check_weight(weight: Weight) -> None:
    if isinstance(weight, DenseWeight) and weight.weight.dtype != torch.float16:
        raise ValueError(f"the kernels compute float16 weights, not {weight.weight.dtype}")


def _tensors_of(weight: Weight) -> list[torch.Tensor]:
    if isinstance(weight, DenseWeight):
        tensors = [weight.weight]
    elif isinstance(weight, Int8Weight):
        tensors = [weight.quantized, weight.scale]
    else:
        tensors = [weight.packed, weight.scale]
    return tensors if weight.bias is None else [*tensors, weight.bias]
