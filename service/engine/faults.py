"""Steps that fail: which of their sequences end, and which are computed again.

A step that raises ends its own sequences, and the engine goes on. Where the device's memory was too
small, only what cannot be computed at all ends: a prefill is tried again in smaller parts, and the
sequences of a decode step give their memory back and are computed again, fewer at a time.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from gptjet.service.engine.backend import Phase, ScheduledBatch
from gptjet.service.engine.sequence import SequenceStatus

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from gptjet.service.engine.backend import Backend
    from gptjet.service.engine.request import RequestOutput
    from gptjet.service.engine.scheduler import Scheduler
    from gptjet.service.engine.sequence import Sequence

logger = logging.getLogger(__name__)

Outputs: TypeAlias = "list[tuple[int, RequestOutput]]"

# What libraries say in a RuntimeError of no class of its own.
_OUT_OF_MEMORY_WORDS = ("CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was too small, the device's or the machine's.

    By the name of its class, so that the engine knows no library: PyTorch's is
    `torch.OutOfMemoryError`, Triton's and CuPy's have that name too.
    """
    if isinstance(error, MemoryError):
        return True
    if any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in _OUT_OF_MEMORY_WORDS
    )


class StepGuard:
    """Runs steps and deals with the errors out of them.

    num_failed_steps  steps that have raised since one last went well, memory aside
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        fail: Callable[[tuple[Sequence, ...], Exception], Outputs],
    ) -> None:
        """`fail` ends sequences with an error and returns their last outputs."""
        self._backend = backend
        self._scheduler = scheduler
        self._fail = fail
        self.num_failed_steps = 0

    def run(
        self,
        batch: ScheduledBatch,
        compute: Callable[[ScheduledBatch, Outputs], None],
        outputs: Outputs,
    ) -> None:
        """Compute a batch, or as much of it as can be; appends to `outputs`. Never raises for a
        backend.
        """
        parts = deque([batch])
        while parts:
            part = parts.popleft()
            before = {sequence: _progress(sequence) for sequence in part.sequences}
            error = _attempt(compute, part, outputs)
            if error is None:
                self.num_failed_steps = 0
                continue
            if not is_out_of_memory(error):
                self.num_failed_steps += 1
                outputs += self._fail(part.sequences, error)
                continue
            # A sequence that has moved on has lost what it was to say: it cannot be tried again.
            same = tuple(
                s
                for s in part.sequences
                if s.status is SequenceStatus.RUNNING and before[s] == _progress(s)
            )
            lost = tuple(s for s in part.sequences if s not in same)
            retry = self._smaller if part.phase is Phase.PREFILL else self._fewer
            again = retry(part, same) if same else None
            if again is None:
                lost = part.sequences
            if lost:
                outputs += self._fail(lost, error)
            if again is not None:
                _log_retry(part, error)
                parts.extendleft(reversed(again))
            # The frames hold the tensors that the next attempt wants the memory of.
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None

    def _smaller(self, part: ScheduledBatch, same: Seq[Sequence]) -> list[ScheduledBatch] | None:
        """A prefill in smaller parts; None where there are none."""
        spec, scheduler = self._backend.spec, self._scheduler
        if not spec.paged:
            for sequence in same:
                self._backend.release(sequence)
        if len(part.sequences) > 1:
            counts = dict(zip(part.sequences, part.num_tokens, strict=False))
            return [
                ScheduledBatch(Phase.PREFILL, (s,), (counts[s],) if counts else ()) for s in same
            ]
        if scheduler.max_prefill_tokens is None or part.num_tokens[0] <= spec.block_size:
            return None
        half = part.num_tokens[0] // 2
        # It would run out again with the next prompt.
        scheduler.max_prefill_tokens = min(scheduler.max_prefill_tokens, half)
        return [ScheduledBatch(Phase.PREFILL, tuple(same), (half,))]

    def _fewer(self, _part: ScheduledBatch, same: Seq[Sequence]) -> list[ScheduledBatch] | None:
        """Preempt a decode step's sequences, and others, until half as many hold memory.

        None where no other holds any. What a failed step has half written is written again.
        """
        scheduler = self._scheduler
        held = [*scheduler.running, *scheduler.prefilling]
        if len(held) <= 1:
            return None
        limit = len(held) // 2
        scheduler.hold_at_most(limit)
        others = sorted((s for s in held if s not in same), key=_arrival)
        # The oldest come last, and so to the head of the queue.
        for sequence in sorted([*same, *others[limit:]], key=_arrival, reverse=True):
            scheduler.preempt(sequence)
            self._backend.release(sequence)
        return []


def _attempt(
    compute: Callable[[ScheduledBatch, Outputs], None], part: ScheduledBatch, outputs: Outputs
) -> Exception | None:
    try:
        compute(part, outputs)
    except Exception as error:  # noqa: BLE001 - whatever a backend raises concerns the sequences
        # of this step and nobody else; `fail` logs it with its traceback.
        return error
    return None


def _log_retry(part: ScheduledBatch, error: Exception) -> None:
    logger.warning(
        "out of memory in a %s step of %d sequences and %s tokens (%s): computed again, %s",
        part.phase.value,
        len(part.sequences),
        sum(part.num_tokens) or "all",
        type(error).__name__,
        "in smaller parts" if part.phase is Phase.PREFILL else "fewer at a time",
    )


def _progress(sequence: Sequence) -> tuple[object, ...]:
    return (
        sequence.status is SequenceStatus.FINISHED,
        sequence.num_tokens,
        sequence.num_computed_tokens,
        len(sequence.prompt_logprobs),
    )


def _arrival(sequence: Sequence) -> int:
    return sequence.sequence_id
