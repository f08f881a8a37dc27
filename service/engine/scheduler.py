"""Who runs in the next step: a prefill half and a decode half."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gptjet.service.engine.backend import BackendSpec, Phase, ScheduledBatch
from gptjet.service.engine.block_manager import Allocation, BlockManager
from gptjet.service.engine.chunk import share_chunk
from gptjet.service.engine.prompt_lookup import PromptLookup
from gptjet.service.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Set


class Scheduler:
    """Continuous batching between steps: sequences wait, then prefill, then run.

    Admission is first come first served. A sequence needs a slot and blocks: on a paged backend
    those of its tokens so far, and one is left for every other sequence that can still grow;
    elsewhere those of the longest it can become.

    After a prefill step comes a decode step, always: a burst of prompts slows running streams by
    at most one prefill step a token. On a backend with max_prefill_tokens that step is a chunk,
    so a long prompt never stalls them; prompts share it, see `share_chunk`.

    Where the backend decodes fewer sequences a step than are running, they take turns.

    A running sequence that needs a block when none is free takes those of the latest arrival
    (itself, where it is that). That one waits at the head of the queue and is computed again.

    Score jobs take room in the same order, that of their ids: a job is not overtaken for ever by
    later sequences, nor the other way round.
    """

    def __init__(
        self,
        spec: BackendSpec,
        max_sequences: int,
        *,
        prefix_cache: bool = True,
        max_prefill_tokens: int | None = None,
    ) -> None:
        """`max_prefill_tokens` lowers the backend's own limit, where it has one."""
        self.block_manager = BlockManager(
            spec.num_kv_blocks, spec.block_size, prefix_cache=prefix_cache and spec.paged
        )
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._spec = spec
        self._most_sequences = min(max_sequences, spec.max_sequences)
        self._max_sequences = self._most_sequences
        # Tokens of a chunk; None: whole prompts only.
        self.max_prefill_tokens = spec.max_prefill_tokens if spec.paged else None
        if self.max_prefill_tokens is not None and max_prefill_tokens is not None:
            self.max_prefill_tokens = min(self.max_prefill_tokens, max_prefill_tokens)
        self._decode_is_due = False
        self._job_ids: set[int] = set()  # of those that hold room
        self._waiting_job_id: int | None = None

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to return, now or after a `finish`."""
        return bool(self.waiting or self.prefilling or self.running)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those that wait already."""
        self.waiting.extend(sequences)

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step, or None when nothing can run."""
        if not (self._decode_is_due and self.running):
            self._admit()
            if self.prefilling:
                self._decode_is_due = True
                return self._prefill_batch()
        self._decode_is_due = False
        return self._decode_batch()

    def schedule_ahead(self, in_flight: Set[Sequence]) -> ScheduledBatch | None:
        """The decode step after one that is still being computed, or None: that must end first.

        The sequences `in_flight` are taken to go on with one token more, but for those whose last
        one it is. Prompts come first, as they would; nobody is preempted. For paged backends.
        """
        self._admit()
        if self.prefilling:
            return None
        ends: dict[Sequence, int] = {}
        for sequence in self.running:
            end = sequence.num_tokens + (sequence in in_flight)
            if end < sequence.request.max_tokens:
                ends[sequence] = end
            if len(ends) == self._spec.max_batch_size:
                break
        manager = self.block_manager
        tight = [
            sequence
            for sequence, end in ends.items()
            if not manager.is_writable(sequence.block_table, end - 1, end)
        ]
        # One token is in one block, so each needs one more at most.
        if not ends or len(tight) > manager.num_free_blocks:
            return None
        copies: list[tuple[int, int]] = []
        for sequence in tight:
            end = ends[sequence]
            made = manager.make_writable(sequence.sequence_id, end - 1, end)
            assert made is not None, "there is a free block for each"
            copies += made
        for sequence in ends:
            self.running.remove(sequence)
        self.running.extend(ends)
        return ScheduledBatch(Phase.DECODE, tuple(ends), (), tuple(copies))

    def prefilled(self, batch: ScheduledBatch) -> list[tuple[int, Sequence]]:
        """Note that a prefill step is computed: (row, sequence) for each next token it decides.

        The continuations that waited for a prompt have its row too.
        """
        decided: list[tuple[int, Sequence]] = []
        for row, sequence in enumerate(batch.sequences):
            if sequence.status is SequenceStatus.FINISHED:
                continue
            count = batch.num_tokens[row] if batch.num_tokens else sequence.num_uncomputed_tokens
            sequence.num_computed_tokens += count
            self._commit(sequence)
            if sequence.num_uncomputed_tokens == 0:
                self.prefilling.remove(sequence)
                self.running.append(sequence)
                decided.append((row, sequence))
                decided += ((row, follower) for follower in self._fork(sequence))
        return decided

    def decoded(self, sequence: Sequence) -> None:
        """Note that a decode step is computed and its tokens appended."""
        block_size = self._spec.block_size
        before = sequence.num_computed_tokens // block_size
        sequence.num_computed_tokens = sequence.num_tokens - 1
        sequence.num_decode_steps += 1
        sequence.draft_token_ids = ()
        if sequence.num_computed_tokens // block_size > before:
            self._commit(sequence)

    def finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a sequence out, wherever it is, and free its blocks; see BlockManager.free."""
        self._queue_of(sequence).remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.block_manager.free(sequence.sequence_id, forget=forget)
        sequence.block_table = []
        if self._max_sequences < self._most_sequences:
            self._max_sequences += 1  # `hold_at_most` is undone one by one

    def hold_at_most(self, num_sequences: int) -> None:
        """Admit no sequence beyond so many, since memory does not last for more.

        Every sequence that finishes raises it by one again, up to what the settings allow.
        """
        self._max_sequences = max(1, num_sequences)

    def preempt(self, sequence: Sequence) -> None:
        """Take the memory of an admitted sequence; it waits first in line to be computed again."""
        self.num_preemptions += 1
        self._queue_of(sequence).remove(sequence)
        self.block_manager.free(sequence.sequence_id)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.draft_token_ids = ()
        sequence.prompt_logprobs = []
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)

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
        if not self._spec.paged and not self._has_slot:
            return None
        headroom = self._headroom() if self._spec.paged else 0
        room = self.block_manager.allocate(job_id, num_blocks, token_ids, headroom=headroom)
        if room is not None:
            self._job_ids.add(job_id)
            self._waiting_job_id = None
        return room

    def finish_job(
        self, job_id: int, computed: tuple[int, ...] = (), *, forget: bool = False
    ) -> None:
        """Take a score job out and free its blocks, whether it holds room or waits for it.

        computed  its prompt, if all of it is computed and others may share it
        forget    what is in its blocks may be wrong: its step failed
        """
        if self._waiting_job_id == job_id:
            self._waiting_job_id = None
        if job_id in self._job_ids:
            self._job_ids.remove(job_id)
            if computed:
                self.block_manager.commit(job_id, computed)
        # One that waits holds no blocks, but the keys that it looked for.
        self.block_manager.free(job_id, forget=forget)

    @property
    def _has_slot(self) -> bool:
        """One more sequence may hold a KV cache; a job holds one where the backend is not paged."""
        held = len(self.running) + len(self.prefilling)
        if not self._spec.paged:
            held += len(self._job_ids)
        return held < self._max_sequences

    def _is_behind_a_job(self, sequence: Sequence) -> bool:
        return self._waiting_job_id is not None and self._waiting_job_id < sequence.sequence_id

    # --- prefill ---

    def _admit(self) -> None:
        # In order: a long request at the head is not overtaken for ever by short ones behind it.
        for sequence in tuple(self.waiting):
            if not self._has_slot or self._is_behind_a_job(sequence):
                return
            leader = sequence.leader
            if leader is not None and leader in self.prefilling:
                continue  # `_fork` admits it, its prompt computed
            if not self._allocate(sequence):
                return
            self.waiting.remove(sequence)
            sequence.leader = None
            sequence.status = SequenceStatus.RUNNING
            self.prefilling.append(sequence)

    def _allocate(self, sequence: Sequence) -> bool:
        manager = self.block_manager
        if self._spec.paged:
            # Where prompt logits are wanted, every token must be computed.
            prompt = [] if sequence.needs_prompt_logits else sequence.token_ids
            blocks, headroom = manager.blocks_for(sequence.num_tokens + 1), self._headroom()
        else:
            prompt, blocks, headroom = [], manager.blocks_for(sequence.request.max_tokens), 0
        allocation = manager.allocate(sequence.sequence_id, blocks, prompt, headroom=headroom)
        if allocation is None:
            return False
        sequence.block_table = allocation.block_table
        sequence.num_computed_tokens = allocation.num_cached_tokens
        return True

    def _headroom(self) -> int:
        """Blocks to leave free: one for every admitted sequence that can still grow."""
        return sum(
            len(sequence.block_table) < self.block_manager.blocks_for(sequence.request.max_tokens)
            for sequence in (*self.running, *self.prefilling)
        )

    def _prefill_batch(self) -> ScheduledBatch:
        if self._spec.paged:
            for sequence in self.prefilling:
                self._reuse(sequence)
        oldest, *others = self.prefilling
        if self.max_prefill_tokens is not None:
            others.sort(key=_length)
        chosen = (oldest, *others[: self._spec.max_prefill_batch_size - 1])
        if self.max_prefill_tokens is not None:
            chunks = share_chunk(self.max_prefill_tokens, [_length(each) for each in chosen])
        elif self._spec.paged:
            chunks = [_length(sequence) for sequence in chosen]
        else:
            chunks = []
        return ScheduledBatch(Phase.PREFILL, chosen[: len(chunks) or None], tuple(chunks))

    def _reuse(self, sequence: Sequence) -> None:
        """Skip what others have computed of its prompt by now."""
        found = self.block_manager.find_more(sequence.sequence_id)
        sequence.num_computed_tokens = max(sequence.num_computed_tokens, found)
        if not sequence.first_step_ns:
            sequence.num_cached_prompt_tokens = sequence.num_computed_tokens

    def _fork(self, leader: Sequence) -> list[Sequence]:
        """Admit the continuations that waited for the leader's prompt, as far as there is room."""
        followers = [sequence for sequence in self.waiting if sequence.leader is leader]
        admitted: list[Sequence] = []
        for follower in followers:
            follower.leader = None
            if self._has_slot and self._headroom() < self.block_manager.num_free_blocks:
                self.waiting.remove(follower)
                follower.block_table = self.block_manager.fork(
                    leader.sequence_id, follower.sequence_id
                )
                follower.num_computed_tokens = leader.num_computed_tokens
                follower.prompt_logprobs = leader.prompt_logprobs
                follower.status = SequenceStatus.RUNNING
                self.running.append(follower)
                admitted.append(follower)
        return admitted

    # --- decode ---

    def _decode_batch(self) -> ScheduledBatch | None:
        batch = [
            self.running.popleft() for _ in range(min(self._spec.max_batch_size, len(self.running)))
        ]
        self.running.extend(batch)
        num_tokens: tuple[int, ...] = ()
        copies: list[tuple[int, int]] = []
        if self._spec.paged:
            tight = []
            for sequence in batch:
                if sequence.request.sampling_params.prompt_lookup_tokens:
                    self._draft(sequence)
                end = sequence.num_tokens + len(sequence.draft_token_ids)
                start = sequence.num_computed_tokens
                if not self.block_manager.is_writable(sequence.block_table, start, end):
                    tight.append(sequence)
            if tight:
                copies = self._make_room(tight)
                batch = [s for s in batch if s.status is SequenceStatus.RUNNING]
            if any(sequence.draft_token_ids for sequence in batch):
                num_tokens = tuple(1 + len(sequence.draft_token_ids) for sequence in batch)
        return (
            ScheduledBatch(Phase.DECODE, tuple(batch), num_tokens, tuple(copies)) if batch else None
        )

    def _draft(self, sequence: Sequence) -> None:
        params = sequence.request.sampling_params
        # The step yields one token more than it has drafts.
        limit = params.max_new_tokens - len(sequence.output_token_ids) - 1
        limit = min(limit, params.prompt_lookup_tokens, self._spec.max_draft_tokens)
        if limit > 0:
            if sequence.lookup is None:
                sequence.lookup = PromptLookup(sequence.token_ids)
            sequence.draft_token_ids = sequence.lookup.draft(limit)

    def _make_room(self, tight: list[Sequence]) -> list[tuple[int, int]]:
        """Give each the blocks of this step, the oldest first; returns the copies to be made."""
        copies: list[tuple[int, int]] = []
        for sequence in sorted(tight, key=_arrival):
            while sequence.status is SequenceStatus.RUNNING:
                end = sequence.num_tokens + len(sequence.draft_token_ids)
                made = self.block_manager.make_writable(
                    sequence.sequence_id, sequence.num_computed_tokens, end
                )
                if made is not None:
                    copies += made
                    break
                if sequence.draft_token_ids:
                    sequence.draft_token_ids = ()  # a guess is not worth another's blocks
                else:
                    self.preempt(max((*self.running, *self.prefilling), key=_arrival))
        return copies

    # --- both ---

    def _queue_of(self, sequence: Sequence) -> deque[Sequence] | list[Sequence]:
        if sequence.status is SequenceStatus.WAITING:
            return self.waiting
        return self.prefilling if sequence in self.prefilling else self.running

    def _commit(self, sequence: Sequence) -> None:
        if self.block_manager.prefix_cache:
            computed = sequence.token_ids[: sequence.num_computed_tokens]
            self.block_manager.commit(sequence.sequence_id, computed)


def _length(sequence: Sequence) -> int:
    return sequence.num_uncomputed_tokens


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
