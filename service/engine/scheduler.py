"""Who runs in the next step: a prefill half and a decode half."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gptjet.service.engine.backend import BackendSpec, Phase, ScheduledBatch
from gptjet.service.engine.block_manager import BlockManager
from gptjet.service.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Iterable


class Scheduler:
    """Continuous batching between steps, first come first served.

    A waiting sequence is admitted when a slot and the KV blocks of its longest form are free; its
    prefill is a step of its own. After a prefill comes a decode step, always, so a burst of new
    requests slows running streams by at most one prefill a token and never stops them. Where the
    backend decodes fewer sequences a step than are running, they take turns.
    """

    def __init__(self, spec: BackendSpec, max_sequences: int) -> None:
        self.block_manager = BlockManager(spec.num_kv_blocks, spec.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self._max_sequences = min(max_sequences, spec.max_sequences)
        self._max_batch_size = spec.max_batch_size
        self._max_prefill_batch_size = spec.max_prefill_batch_size
        self._decode_is_due = False

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

    def _admit(self) -> tuple[Sequence, ...]:
        # In order: a long request at the head is not overtaken for ever by short ones behind it.
        admitted: list[Sequence] = []
        while (
            self.waiting
            and len(admitted) < self._max_prefill_batch_size
            and len(self.running) < self._max_sequences
            and self.block_manager.can_allocate(self.waiting[0].request.max_tokens)
        ):
            sequence = self.waiting.popleft()
            self.block_manager.allocate(sequence, sequence.request.max_tokens)
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            admitted.append(sequence)
        return tuple(admitted)
