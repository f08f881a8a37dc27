"""The pass of a few rows, over buffers that never move: launched, or replayed as a CUDA graph.

A row is one token of a sequence. Rows are padded up to a bucket, and each bucket is a CUDA graph of
its own; so is the choice of the next ids, which may stay on the device until the next pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from gptjet.kernels.batch import BLOCK_SIZE, ForwardBatch
from gptjet.kernels.gpu.buffers import (
    IdReader,
    RowBuffers,
    RowInputs,
    SampledIds,
    transfers_for,
)
from gptjet.kernels.gpu.gemv_launch import capability_of
from gptjet.kernels.gpu.graphs import BucketedPass, CaptureError, Recorder, bucket_for, row_buckets
from gptjet.kernels.gpu.weight_passes import WeightPasses

if TYPE_CHECKING:
    from gptjet.kernels.batch import BlockGeometry, SamplingBatch
    from gptjet.kernels.gpu.operations import Operations
    from gptjet.kernels.weights import HeadWeights, LayerWeights

# (draws, filters) of a step: each is a graph of its own, of the launches that it needs.
_SAMPLING_KINDS = ((False, False), (True, False), (True, True))

# Of the largest logit: some roundings of float16.
_REPLAY_TOLERANCE = 2.0**-7


class RowPass:
    """At most `max_rows` rows at once. Call it with the model's device current, without gradients.

    buckets   numbers of rows that a pass is padded up to, ascending
    """

    def __init__(
        self,
        geometry: BlockGeometry,
        head: HeadWeights,
        layers: Sequence[LayerWeights],
        operations: Operations,
        passes: WeightPasses,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        max_rows: int,
    ) -> None:
        """`rotary` is the cosines and the sines. The weights stay their owner's; see `close`."""
        self.buckets = row_buckets(max_rows)
        self._geometry = geometry
        self._head: HeadWeights | None = head
        self._layers = layers
        self._operations, self._passes = operations, passes
        self._cos, self._sin = rotary
        device = head.embedding.device
        transfers = transfers_for(device)
        table_width = -(-geometry.max_context // BLOCK_SIZE)
        self._inputs = RowBuffers(max_rows, table_width, device, transfers)
        self._views: dict[int, RowInputs] = {}
        self._buffers = _Buffers(geometry, max_rows, device)
        self._attention_workspace = torch.empty(
            operations.attention_workspace(
                max_rows,
                geometry.num_heads,
                geometry.head_dim,
                table_width,
                capability_of(device),
            ),
            device=device,
        )
        self._sampling_memory = operations.sampling_memory(max_rows, geometry.vocab_size, device)
        self._ids = IdReader(max_rows, transfers)
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
        """Bytes of the buffers."""
        own = self._buffers.nbytes + self._attention_workspace.nbytes
        return own + _nbytes(self._sampling_memory)

    def logits(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab] float32 of every row: a view of what the next pass overwrites."""
        rows = batch.token_ids.shape[0]
        bucket = bucket_for(rows, self.buckets)
        self._inputs.fill(batch, bucket)
        self._run(self._logits_pass, bucket, kv_cache)
        return self._buffers.logits[:rows]

    def sample(
        self, batch: ForwardBatch, sampling: SamplingBatch, kv_cache: torch.Tensor
    ) -> SampledIds:
        """Compute the rows and choose the next id of each; returns once all is launched.

        Raises ValueError for more than `max_rows` rows.
        """
        rows = batch.token_ids.shape[0]
        bucket = bucket_for(rows, self.buckets)
        self._inputs.fill(batch, bucket, sampling)
        self._run(self._logits_pass, bucket, kv_cache)
        kind = (sampling.draws, sampling.filters)
        self._run(self._sampling_passes[kind], bucket, kv_cache)
        return self._ids.start(self._buffers.sampled[:rows])

    def launch_each(self, kv_cache: torch.Tensor) -> None:
        """Launch every bucket, and its sampling in every kind, over whatever is in the buffers."""
        for bucket in self.buckets:
            self._kv_cache = kv_cache
            self._launch_logits(bucket)
            for kind in _SAMPLING_KINDS:
                self._launch_sampling(kind, bucket)

    def capture(
        self,
        kv_cache: torch.Tensor,
        recorder: Recorder,
        on_bucket: Callable[[int], None] | None = None,
    ) -> None:
        """Record every bucket over this KV cache, the largest first; see GpuModel.capture."""
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
        """Give the memory back, the weights' too as far as it holds them. Nothing runs after."""
        self.forget_graphs()
        self._head = None
        self._layers = ()
        self._views.clear()
        self._kv_cache = None
        self._buffers = _Buffers(self._geometry, 0, self._attention_workspace.device)
        self._attention_workspace = self._attention_workspace.new_empty(0)
        self._sampling_memory = None

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
        passes, eps = self._passes, self._geometry.layer_norm_eps
        residual, projected = buffers.residual[:bucket], buffers.projected[:bucket]
        queries, attended = buffers.queries[:bucket], buffers.attended[:bucket]
        where = (inputs.positions, inputs.sequence_index, inputs.block_tables)
        inner = projected[:, 3 * attended.shape[1] :]
        run.embed(inputs.token_ids, inputs.sources, buffers.sampled, head.embedding, residual)
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            passes.layer_norm_linear(
                residual, layer.norm_weight, layer.norm_bias, eps, layer.w_in, projected
            )
            run.rotary_write_kv(projected, self._cos, self._sin, *where, cache, queries)
            run.paged_attention(
                queries, cache, *where, attended, workspace=self._attention_workspace
            )
            passes.gelu_linear_residual(residual, attended, inner, layer.w_out)
        logits = buffers.logits[:bucket]
        passes.layer_norm_linear(
            residual, head.norm_weight, head.norm_bias, eps, head.lm_head, logits
        )

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

    def _view(self, bucket: int) -> RowInputs:
        if bucket not in self._views:
            self._views[bucket] = self._inputs.views(bucket)
        return self._views[bucket]

    def _capture(self, bucket: int, kv_cache: torch.Tensor, recorder: Recorder) -> None:
        """Record one bucket, and hold its replay to what the launches compute."""
        self._kv_cache = kv_cache
        self._inputs.fill(_probe(self._geometry, bucket, kv_cache.shape[2]), bucket)
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
