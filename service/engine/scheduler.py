"""Who runs in the next step: a prefill half and a decode half."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptjet.service.engine.backend import BackendSpec, Phase, ScheduledBatch
from gptjet.service.engine.block_manager import Allocation, BlockManager
from gptjet.service.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(slots=True)
class _JobBlocks:
    """A score job, as the block manager knows it."""

    sequence_id: int
    block_table: list[int] = field(default_factory=list)


class Scheduler:
    """Continuous batching between steps, first come first served.

    A waiting sequence is admitted when a slot and the KV blocks of its longest form are free; its
    prefill is a step of its own. After a prefill comes a decode step, always, so a burst of new
    requests slows running streams by at most one prefill a token and never stops them. Where the
    backend decodes fewer sequences a step than are running, they take turns.

    Score jobs take room in the same order, that of their ids: a job is not overtaken for ever by
    later sequences, nor the other way round.
    """

    def __init__(self, spec: BackendSpec, max_sequences: int) -> None:
        self.block_manager = BlockManager(spec.num_kv_blocks, spec.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self._max_sequences = min(max_sequences, spec.max_sequences)
        self._max_batch_size = spec.max_batch_size
        self._max_prefill_batch_size = spec.max_prefill_batch_size
        self._decode_is_due = False
        self._is_paged = spec.paged
        self._jobs: dict[int, _JobBlocks] = {}  # those that hold room
        self._waiting_job_id: int | None = None

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to return, now or after a `finish`."""
        return bool(self.waiting or self.running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those that wait already."""
        self.waiting.extend(sequences)

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step, or None when nothing can run."""
        if not (self._decode_is_due and self.running):
            admitted = self._admit()
            if admitted:
                self._decode_is_due = True
                return ScheduledBatch(Phase.PREFILL, admitted)
        self._decode_is_due = False
        if not self.running:
            return None
        batch = [
            self.running.popleft() for _ in range(min(self._max_batch_size, len(self.running)))
        ]
        self.running.extend(batch)
        return ScheduledBatch(Phase.DECODE, tuple(batch))

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        queue = self.waiting if sequence.status is SequenceStatus.WAITING else self.running
        queue.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.block_manager.free(sequence)

    # --- score jobs ---

    def require_decode(self) -> None:
        """Make the next step a decode, if anything can decode: a piece of a score job has run."""
        self._decode_is_due = True

    def admit_job(
        self, job_id: int, num_blocks: int, token_ids: tuple[int, ...]
    ) -> Allocation | None:
        """Give a score job `num_blocks` blocks, and a slot where its cache is one; None: not yet.

        `token_ids` is its prompt, whose beginning may be shared. A job that was refused is next in
        line by its id until it is admitted, or finished.
        """
        self._waiting_job_id = job_id
        if self.waiting and self.waiting[0].sequence_id < job_id:
            return None
        if not self._is_paged and not self._has_slot:
            return None
        num_tokens = num_blocks * self.block_manager.block_size
        if not self.block_manager.can_allocate(num_tokens):
            return None
        holder = _JobBlocks(job_id)
        self.block_manager.allocate(holder, num_tokens)
        self._jobs[job_id] = holder
        self._waiting_job_id = None
        return Allocation(holder.block_table, 0)

    def finish_job(
        self, job_id: int, computed: tuple[int, ...] = (), *, forget: bool = False
    ) -> None:
        """Take a score job out and free its blocks, whether it holds room or waits for it.

        computed  its prompt, if all of it is computed and others may share it
        forget    what is in its blocks may be wrong: its step failed
        """
        if self._waiting_job_id == job_id:
            self._waiting_job_id = None
        holder = self._jobs.pop(job_id, None)
        if holder is not None:
            self.block_manager.free(holder)

    @property
    def _has_slot(self) -> bool:
        """One more sequence may hold a KV cache; a job holds one where the backend is not paged."""
        held = len(self.running) + (0 if self._is_paged else len(self._jobs))
        return held < self._max_sequences

    def _is_behind_a_job(self, sequence: Sequence) -> bool:
        return self._waiting_job_id is not None and self._waiting_job_id < sequence.sequence_id

    def _admit(self) -> tuple[Sequence, ...]:
        # In order: a long request at the head is not overtaken for ever by short ones behind it.
        admitted: list[Sequence] = []
        while (
            self.waiting
            and len(admitted) < self._max_prefill_batch_size
            and self._has_slot
            and not self._is_behind_a_job(self.waiting[0])
            and self.block_manager.can_allocate(self.waiting[0].request.max_tokens)
        ):
            sequence = self.waiting.popleft()
            self.block_manager.allocate(sequence, sequence.request.max_tokens)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
        return tuple(admitted)
