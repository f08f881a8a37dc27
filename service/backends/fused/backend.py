"""The `fused` backend: continuous batching over a paged KV cache. See `loader` for its making."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptjet.kernels.batch import BLOCK_SIZE, SamplingBatch
from gptjet.service.backends.fused.runner import ModelRunner, Segment
from gptjet.service.backends.fused.scoring import score
from gptjet.service.engine.backend import (
    BackendSpec,
    PrefillResult,
    SampledBatch,
    SampledTokenIds,
    ScheduledBatch,
    ScoreJob,
)

if TYPE_CHECKING:
    from gptjet.service.engine.sequence import Sequence


class FusedBackend:
    """Drives a ModelRunner for the engine.

    It keeps nothing of a sequence: where its keys and values are stands in its block table, so
    sharing, preempting and forgetting blocks is the block manager's business alone.
    """

    def __init__(
        self,
        runner: ModelRunner,
        spec: BackendSpec,
        *,
        torch_threads: int | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """torch_threads  what PyTorch has again once this is closed
        prepare        done once, in `warm_up`, when nothing is in the KV cache yet
        """
        self._prepare = prepare
        self._runner = runner
        self._spec = spec
        self._torch_threads = torch_threads

    @property
    def spec(self) -> BackendSpec:
        """Paged; many sequences a step."""
        return self._spec

    @property
    def runner(self) -> ModelRunner:
        """What computes, for measuring."""
        return self._runner

    def warm_up(self) -> None:
        """Run a chunk of a prompt and a token after it, for the pages and threads they take."""
        blocks = list(range(self._spec.num_kv_blocks))
        most = min(len(blocks) * BLOCK_SIZE, self._spec.max_context) - 1
        length = max(1, min(BLOCK_SIZE, most))
        _owned(self._runner.run([Segment([0] * length, 0, blocks, wanted=1)]))
        if most > length:
            self._runner.decode([0], [length], [blocks])
        if self._prepare is not None:
            self._prepare()
        if self._runner.kv_cache.device.type == "cuda":
            torch.cuda.synchronize(self._runner.kv_cache.device)

    def prefill(self, batch: ScheduledBatch) -> PrefillResult:
        """Compute the tokens into the sequences' blocks; see Backend and PrefillResult."""
        self._runner.copy_blocks(batch.block_copies)
        segments, ends = [], []
        for index, sequence in enumerate(batch.sequences):
            start = sequence.num_computed_tokens
            token_ids = sequence.token_ids
            end = start + batch.num_tokens[index] if batch.num_tokens else len(token_ids)
            is_last = end == len(token_ids)
            # A chunk that the prompt goes on after has no next token to sample.
            wanted = end - start if sequence.needs_prompt_logits else int(is_last)
            segments.append(Segment(token_ids[start:end], start, sequence.block_table, wanted))
            ends.append(is_last)
        rows = _owned(self._runner.run(segments))
        if all(segment.wanted == 1 for segment in segments) and not any(
            sequence.needs_prompt_logits for sequence in batch.sequences
        ):
            return PrefillResult(rows, (None,) * len(segments))
        return _divide(rows, batch, segments, ends)

    def decode(self, batch: ScheduledBatch) -> torch.Tensor:
        """Compute each sequence's last token and its drafts: [sum of num_tokens, V] float32."""
        self._runner.copy_blocks(batch.block_copies)
        sequences = batch.sequences
        fits = len(sequences) <= self._runner.max_segments
        if fits and not any(sequence.draft_token_ids for sequence in sequences):
            return _owned(
                self._runner.decode(
                    [sequence.last_token_id for sequence in sequences],
                    [sequence.num_tokens - 1 for sequence in sequences],
                    [sequence.block_table for sequence in sequences],
                )
            )
        segments = []
        for sequence in sequences:
            token_ids = (sequence.last_token_id, *sequence.draft_token_ids)
            start = sequence.num_tokens - 1
            segments.append(Segment(token_ids, start, sequence.block_table, wanted=len(token_ids)))
        return _owned(self._runner.run(segments))

    def decode_and_sample(self, batch: SampledBatch) -> SampledTokenIds:
        """See SamplingBackend; where `spec.samples_on_device`."""
        self._runner.copy_blocks(batch.block_copies)
        states = [sequence.sampling_state for sequence in batch.sequences]
        params = [state.params for state in states]
        sampling = SamplingBatch(
            sources=np.array(batch.sources, np.int32),
            temperature=np.array([p.temperature for p in params], np.float64),
            top_k=np.array([min(p.top_k, self._spec.vocab_size) for p in params], np.int64),
            top_p=np.array([p.top_p for p in params], np.float64),
            min_p=np.array([p.min_p for p in params], np.float64),
            seed=np.array([state.seed for state in states], np.uint64),
            index=np.array([state.index for state in states], np.int64),
            position=np.array(batch.draw_positions, np.int64),
        )
        tables = [sequence.block_table for sequence in batch.sequences]
        return self._runner.decode_and_sample(batch.token_ids, batch.positions, tables, sampling)

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        """See Backend; `job.block_table` must hold the blocks that ScoreJob describes."""
        return score(self._runner, job, self._spec.max_prefill_tokens or self._runner.max_tokens)

    def release(self, sequence: Sequence) -> None:
        """Nothing: the blocks are the block manager's."""

    def close(self) -> None:
        """Give the KV cache and the weights back."""
        self._runner.close()
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _divide(
    rows: torch.Tensor,
    batch: ScheduledBatch,
    segments: list[Segment],
    ends: list[bool],
) -> PrefillResult:
    """The rows of a pass as the sequences' last ones and their prompts' ones."""
    # zeros, for rows that nobody reads: what the sampler looks at must be finite
    logits = rows.new_zeros(len(segments), rows.shape[1])
    prompt_logits: list[torch.Tensor | None] = []
    first = 0
    for index, (sequence, segment) in enumerate(zip(batch.sequences, segments, strict=True)):
        mine = rows[first : first + segment.wanted]
        first += segment.wanted
        if segment.wanted:
            logits[index] = mine[-1]
        wants_prompt = sequence.needs_prompt_logits
        prompt_logits.append((mine[:-1] if ends[index] else mine) if wants_prompt else None)
    return PrefillResult(logits, tuple(prompt_logits))


def _owned(rows: torch.Tensor) -> torch.Tensor:
    """The rows as an ordinary tensor, which the sampler may change."""
    return torch.empty_like(rows).copy_(rows) if rows.is_inference() else rows
