"""A GPT-J-class model on an NVIDIA card: Triton kernels for few rows, cuBLAS and SDPA for many.

A pass goes one of two ways.

    rows      a token or a few of each sequence (decoding, drafts), at most `max_rows`: row_pass
    prefill   everything else: prompts and their chunks

The residual stream is float32, everything else float16; kernels compute in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptjet.kernels import reference
from gptjet.kernels.gpu import graphs
from gptjet.kernels.gpu.block_copier import BlockCopier
from gptjet.kernels.gpu.buffers import SampledIds, transfers_for
from gptjet.kernels.gpu.gemv_launch import MAX_ROWS, Workspace, align_rows, capability_of
from gptjet.kernels.gpu.graphs import Recorder
from gptjet.kernels.gpu.matmul import Matmul
from gptjet.kernels.gpu.prefill_attention import prefill_attention, spans_of
from gptjet.kernels.gpu.routes import max_gemv_rows
from gptjet.kernels.gpu.row_pass import RowPass
from gptjet.kernels.gpu.weight_passes import WeightPasses
from gptjet.kernels.weights import DenseWeight, Int8Weight

if TYPE_CHECKING:
    from gptjet.kernels.batch import BlockGeometry, ForwardBatch, SamplingBatch
    from gptjet.kernels.gpu.operations import Operations
    from gptjet.kernels.weights import HeadWeights, LayerWeights, Weight


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
        gemv_rows = min(max_gemv_rows(weight, capability) for weight in weights)
        matmul = Matmul(operations, weights, self.device)
        self._cos, self._sin = reference.rotary_tables(
            geometry.max_context, geometry.rotary_dim, self.device
        )
        workspace = Workspace.for_weights(self.device, self._passes(), MAX_ROWS)
        self._weight_passes = WeightPasses(operations, matmul, workspace, gemv_rows)
        self._row_pass = RowPass(
            geometry,
            head,
            self._layers,
            operations,
            self._weight_passes,
            (self._cos, self._sin),
            max_rows=self.max_rows,
        )
        self.buckets = self._row_pass.buckets
        transfers = transfers_for(self.device)
        self._copier = BlockCopier(operations.copy_blocks, self.device, transfers)
        if self.device.type == "cuda":
            # No prompt waits for the compiler because it is the first of its length.
            with torch.no_grad(), self._on_device():
                self._launch_many_rows()

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
        buffers = self._weight_passes.nbytes + self._row_pass.nbytes + self._copier.nbytes
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
            logits = self._row_pass.logits(batch, kv_cache)
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
        with self._on_device():
            return self._row_pass.sample(batch, sampling, kv_cache)

    @torch.no_grad()
    def launch_each(self, kv_cache: torch.Tensor) -> None:
        """Launch every row pass once, over whatever is in the buffers: for the launches' sake.

        And the weight passes of many rows, as `__init__` does on a card.
        """
        with self._on_device():
            self._row_pass.launch_each(kv_cache)
            self._launch_many_rows()

    @torch.no_grad()
    def copy_blocks(self, copies: Sequence[tuple[int, int]], kv_cache: torch.Tensor) -> None:
        """Copy (source, destination) blocks, all sources before any destination is written.

        Returns once it is launched. Raises ValueError where blocks would have to change places.
        """
        with self._on_device():
            self._copier.copy(kv_cache, copies)

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
        with torch.no_grad(), self._on_device():
            self._row_pass.capture(kv_cache, recorder, on_bucket)

    @property
    def recorded_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that are replayed as graphs."""
        return self._row_pass.recorded_buckets

    def forget_graphs(self) -> None:
        """Launch every pass from now on."""
        self._row_pass.forget_graphs()

    def close(self) -> None:
        """Give the memory back. Nothing is computed afterwards; twice is fine."""
        self._row_pass.close()
        self._head = None
        self._layers.clear()
        self._weight_passes.close()

    def _is_row_pass(self, batch: ForwardBatch) -> bool:
        tokens, sequences = batch.token_ids.shape[0], batch.block_tables.shape[0]
        # One token each of any number of sequences; of more than one each, only as many as a GEMV
        # kernel takes: the attention of a row pass reads a sequence's KV for every row anew.
        return tokens <= self.max_rows and (tokens == sequences or tokens <= MAX_ROWS)

    def _launch_many_rows(self) -> None:
        """Launch the weight passes of a block and the lm_head by every way that many rows take."""
        head, layer, sizes = self._head, self._layers[0], self.geometry
        assert head is not None
        width, eps = sizes.num_heads * sizes.head_dim, sizes.layer_norm_eps
        matmul = self._weight_passes.matmul
        for rows in matmul.kinds_of_rows:
            residual = torch.zeros(rows, sizes.hidden_size, device=self.device)
            projected = residual.new_zeros(rows, layer.w_in.shape[0], dtype=torch.float16)
            norm = (layer.norm_weight, layer.norm_bias, eps)
            matmul.layer_norm_linear(residual, *norm, layer.w_in, projected)
            attended, inner = projected[:, :width], projected[:, 3 * width :]
            matmul.gelu_linear_residual(residual, attended, inner, layer.w_out)
            logits = residual.new_zeros(rows, sizes.vocab_size)
            norm = (head.norm_weight, head.norm_bias, eps)
            matmul.layer_norm_linear(residual, *norm, head.lm_head, logits)

    def _passes(self) -> Iterator[tuple[str, Weight]]:
        """The weight passes by the name of their kernel."""
        for layer in self._layers:
            yield "layer_norm_linear", layer.w_in
            yield "gelu_linear_residual", layer.w_out
        if self._head is not None:
            yield "layer_norm_linear", self._head.lm_head

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
        matmul, eps = self._weight_passes.matmul, sizes.layer_norm_eps
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            matmul.layer_norm_linear(
                residual, layer.norm_weight, layer.norm_bias, eps, layer.w_in, projected
            )
            run.rotary_write_kv(
                projected, self._cos, self._sin, positions, index, tables, cache, queries
            )
            prefill_attention(queries, cache, spans, attended)
            matmul.gelu_linear_residual(residual, attended, inner, layer.w_out)
        rows = residual[wanted]
        logits = rows.new_empty(rows.shape[0], sizes.vocab_size)
        # Usually the last row of each prompt: few rows are the kernels' again.
        self._weight_passes.layer_norm_linear(
            rows, head.norm_weight, head.norm_bias, eps, head.lm_head, logits
        )
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
        # Each begins at a multiple of 16 bytes, as kernels are compiled for pointers that do.
        starts = list(itertools.accumulate((-(-p.numel() // 4) * 4 for p in parts), initial=0))
        host = torch.zeros(starts[-1], dtype=torch.int32)
        for start, part in zip(starts, parts, strict=False):
            host[start : start + part.numel()] = part
        # One buffer, pinned by nobody: torch waits for a copy out of pageable memory, which is
        # nothing beside a prefill, and the runner may then write its arrays anew.
        together = host.to(self.device)
        sent = [together[s : s + p.numel()] for s, p in zip(starts, parts, strict=False)]
        sent[3] = sent[3].view(batch.block_tables.shape)
        return sent


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
