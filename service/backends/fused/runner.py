"""From the scheduler's words to a forward pass: index tensors in, rows of logits out.

What a step costs beside the model itself is here, so nothing loops over tokens and no buffer is
made anew: a decode step writes one row a sequence into arrays that live as long as the runner.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from gptjet.kernels.batch import BLOCK_SIZE, BlockGeometry, ForwardBatch, SamplingBatch
from gptjet.service.engine.backend import SampledTokenIds


class FusedModel(Protocol):
    """A forward pass over a paged KV cache: kernels for one kind of device, or PyTorch."""

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        ...

    def forward(self, batch: ForwardBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Write the tokens' keys and values, and return logits [R, V] float32 of logits_rows."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@runtime_checkable
class SamplingModel(Protocol):
    """A FusedModel that can choose the next tokens where it computes them."""

    def forward_and_sample(
        self, batch: ForwardBatch, sampling: SamplingBatch, kv_cache: torch.Tensor
    ) -> SampledTokenIds:
        """Launch one token of each sequence and the choice of the next; see SamplingBatch."""
        ...


@runtime_checkable
class CopyingModel(Protocol):
    """A FusedModel that copies KV blocks without waiting for its device."""

    def copy_blocks(self, copies: Sequence[tuple[int, int]], kv_cache: torch.Tensor) -> None:
        """Copy (source, destination) blocks, all sources before any destination is written."""
        ...


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one sequence that stand together, to be computed against its KV blocks.

    start    position of the first one
    wanted   of how many of them, counted from the last one, the logits are wanted
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    wanted: int


class ModelRunner:
    """Runs segments through a model, against one KV cache."""

    def __init__(
        self,
        model: FusedModel,
        geometry: BlockGeometry,
        kv_cache: torch.Tensor,
        *,
        max_tokens: int,
        max_segments: int,
    ) -> None:
        """At most `max_tokens` tokens of `max_segments` segments go into one pass.

        kv_cache  [layers, 2, num_blocks, heads, BLOCK_SIZE, head_dim]; INT8: INT8_KV_ROWS rows
        """
        self.model = model
        self.geometry = geometry
        self.kv_cache = kv_cache
        self.max_tokens = max_tokens
        self.max_segments = max_segments
        self._width = -(-geometry.max_context // BLOCK_SIZE)
        self._token_ids = np.zeros(max_tokens, np.int32)
        self._positions = np.zeros(max_tokens, np.int32)
        self._sequence_index = np.zeros(max_tokens, np.int32)
        self._logits_rows = np.zeros(max_tokens, np.int32)
        self._block_tables = np.zeros((max_segments, self._width), np.int32)
        # What stands in each row of the block tables: comparing is cheaper than writing again.
        self._written: list[list[int]] = [[] for _ in range(max_segments)]
        self._count = np.arange(max(max_tokens, geometry.max_context) + 1, dtype=np.int32)
        # The same memory as PyTorch sees it; a pass takes the front of each.
        self._tensors = tuple(
            torch.from_numpy(array)
            for array in (self._token_ids, self._positions, self._sequence_index)
        )
        self._tables_tensor = torch.from_numpy(self._block_tables)
        self._rows_tensor = torch.from_numpy(self._logits_rows)
        self._count_tensor = torch.from_numpy(self._count)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, destination) blocks, all sources before any destination is written."""
        if not copies:
            return
        if isinstance(self.model, CopyingModel):
            self.model.copy_blocks(copies, self.kv_cache)
        else:
            device = self.kv_cache.device
            sources = torch.tensor([source for source, _ in copies], device=device)
            destinations = torch.tensor([destination for _, destination in copies], device=device)
            self.kv_cache[:, :, destinations] = self.kv_cache[:, :, sources]

    def decode(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """One token each of S sequences: logits [S, V] float32. S is at most `max_segments`."""
        return self.model.forward(self._batch_of(token_ids, positions, tables), self.kv_cache)

    def decode_and_sample(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        sampling: SamplingBatch,
    ) -> SampledTokenIds:
        """One token each of S sequences, and the next ones, which nobody has waited for yet.

        S is at most `max_segments`. Raises TypeError where the model does not sample.
        """
        if not isinstance(self.model, SamplingModel):
            raise TypeError(f"{type(self.model).__name__} does not sample")
        batch = self._batch_of(token_ids, positions, tables)
        return self.model.forward_and_sample(batch, sampling, self.kv_cache)

    def _batch_of(
        self, token_ids: Sequence[int], positions: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> ForwardBatch:
        size = len(token_ids)
        self._token_ids[:size] = token_ids
        self._positions[:size] = positions
        for row, table in enumerate(tables):
            self._write_table(row, table)
        everyone = self._count_tensor[:size]
        return ForwardBatch(
            token_ids=self._tensors[0][:size],
            positions=self._tensors[1][:size],
            sequence_index=everyone,
            block_tables=self._tables_tensor[:size],
            logits_rows=everyone,
        )

    def run(self, segments: Iterable[Segment]) -> torch.Tensor:
        """Any number of segments, in as many passes as they need.

        Returns the wanted rows of logits [R, V] float32, in the order of the segments and, within
        each, of its tokens.
        """
        rows = [self.run_pass(part) for part in self.split(segments)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def split(self, segments: Iterable[Segment]) -> Iterator[list[Segment]]:
        """Divide segments into passes within the limits; a long one goes over several."""
        part: list[Segment] = []
        room = self.max_tokens
        for segment in segments:
            rest = segment
            while True:
                if room == 0 or len(part) == self.max_segments:
                    yield part
                    part, room = [], self.max_tokens
                count = len(rest.token_ids)
                if count <= room:
                    part.append(rest)
                    room -= count
                    break
                later = min(rest.wanted, count - room)
                part.append(
                    replace(rest, token_ids=rest.token_ids[:room], wanted=rest.wanted - later)
                )
                rest = replace(
                    rest,
                    token_ids=rest.token_ids[room:],
                    start=rest.start + room,
                    wanted=later,
                )
                room = 0
        if part:
            yield part

    def run_pass(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Segments that fit one pass: their wanted rows of logits [R, V] float32; R may be 0."""
        end = rows = 0
        for index, segment in enumerate(segments):
            first, end = end, end + len(segment.token_ids)
            last = segment.start + end - first
            self._token_ids[first:end] = segment.token_ids
            self._positions[first:end] = self._count[segment.start : last]
            self._sequence_index[first:end] = index
            self._write_table(index, segment.block_table)
            wanted = segment.wanted
            self._logits_rows[rows : rows + wanted] = self._count[end - wanted : end]
            rows += wanted
        token_ids, positions, sequence_index = (tensor[:end] for tensor in self._tensors)
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            sequence_index=sequence_index,
            block_tables=self._tables_tensor[: len(segments)],
            logits_rows=self._rows_tensor[:rows],
        )
        return self.model.forward(batch, self.kv_cache)

    def close(self) -> None:
        """Drop the KV cache and the model's weights."""
        self.model.close()
        self.kv_cache = self.kv_cache.new_empty(0)

    def _write_table(self, row: int, table: Sequence[int]) -> None:
        if self._written[row] != table:
            blocks = list(itertools.islice(table, self._width))
            self._block_tables[row, : len(blocks)] = blocks
            self._written[row] = blocks
